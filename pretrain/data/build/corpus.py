"""The build: raw files -> tokenizer -> splits -> shards -> manifest.

A build that is killed at any moment leaves no manifest; run again, it continues and makes the same bytes. Its private
notes lie in `.build/` inside the corpus until the manifest is written.
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np

from pretrain.config.data import CorpusConfig
from pretrain.data.build.groups import (
    RAW_FILES_CHANGED,
    GroupRecord,
    ShardGroup,
    Workplace,
    build_groups,
    deal_to_groups,
)
from pretrain.data.build.plan import (
    BuildProgress,
    Scan,
    all_documents,
    held_out_first,
    plan_groups,
    sampled_characters,
    scan,
)
from pretrain.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    SplitEntry,
    SplitRule,
    TokenizerEntry,
    load_manifest,
    save_manifest,
    save_token_counts,
)
from pretrain.data.shards.shard import verify_shard
from pretrain.data.sources.documents import InputFile
from pretrain.data.sources.inputs import find_inputs, source_name
from pretrain.data.tokenizer import Tokenizer, token_dtype, train_tokenizer, training_characters
from pretrain.errors import UserError
from pretrain.files import atomic_path, disk_errors, sha256_of, write_json

_BUILD = ".build"
_OWN_SHARD = re.compile(r"shard-\d{6}(-\d+)?(\.tar|\.index\.npy)")
Inputs = Sequence[Sequence[InputFile]]


def silent(stage: str, done: int, total: int, documents: int) -> None:
    """Report nothing."""


def build_corpus(config: CorpusConfig, report: BuildProgress = silent, share: tuple[int, int] = (0, 1)) -> Manifest:
    """Make the corpus at `config.path`, continue a build that was killed, or return the finished one.

    Args:
        config: what to build; the result does not depend on `processes`.
        report: called with a stage (reading, tokenizer, encoding, already built; "(continuing)" is added to one that
            an earlier build began), bytes of text done, those in all (0 while not known), and documents done.
        share: (k, n) reads every n-th file of each source, from the k-th (counted from 0): what a part is built from.

    Raises:
        UserError: wrong sources, a bad record, a corpus too small for its splits, streams or vocabulary, a finished
            corpus of other sources or settings in the same place, another build at work there, a full disk, or a place
            that cannot be written to.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "build_corpus was called while Python started a process for it, which runs the script anew: put the call "
            'under `if __name__ == "__main__":`, or set corpus.processes=1'
        )
    if not config.sources:
        raise UserError(
            f"corpus.sources is empty, so there is nothing to build {config.path} from; name raw files there, for "
            "instance corpus.sources=[{path: data/*.txt.gz}]"
        )
    config = held_out_first(config)
    inputs = [find_inputs(source)[share[0] :: share[1]] for source in config.sources]
    if not any(inputs):
        raise UserError(f"corpus.sources have fewer files than {share[1]}; build the corpus in fewer parts")
    key = build_key(config, inputs)
    if finished := _already_built(config, key, report):
        return finished
    kept = "the shards that are finished are kept. Free space and run the same command again: it continues"
    with disk_errors(config.path, kept), _exclusive(config.path):
        return _already_built(config, key, report) or _Build(config, inputs, key, report).run()


def build_key(config: CorpusConfig, inputs: Inputs) -> str:
    """sha256 over every setting that the bytes depend on and the names and sizes of the raw files.

    Folders are not in it, so a corpus stays the same when it, or its raw files, move.
    """
    settings = config.model_dump(mode="json", exclude={"path", "url", "processes", "sources"})
    settings["sources"] = [source.model_dump(mode="json", exclude={"path"}) for source in config.sources]
    for source in settings["sources"]:
        for name in ("metadata_fields", "split"):
            if not source[name]:
                del source[name]  # A corpus from before there was the setting stays the same.
    settings["files"] = [[(file.label, file.path.stat().st_size) for file in files] for files in inputs]
    model = config.tokenizer.model
    settings["tokenizer"]["model"] = _model_digest(model) if model else None
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _model_digest(model: Path) -> str:
    if not model.is_file():
        raise UserError(f"corpus.tokenizer.model = {model} is no file; name a sentencepiece model or leave it out")
    return sha256_of(model)


def _already_built(config: CorpusConfig, key: str, report: BuildProgress) -> Manifest | None:
    if not (config.path / MANIFEST).is_file():
        return None
    manifest = load_manifest(config.path)
    if manifest.build_key != key:
        raise UserError(
            f"{config.path} is a finished corpus of other sources or settings (corpus.*, or names and sizes of the raw "
            "files); set another corpus.path, or delete the folder to build it anew"
        )
    shutil.rmtree(config.path / _BUILD, ignore_errors=True)
    report("already built", 1, 1, 0)
    return manifest


@contextmanager
def _exclusive(corpus: Path) -> Iterator[None]:
    """Keep a second build out of the folder; the lock goes with the process, however it ends."""
    if not (corpus / _BUILD).is_dir():
        _refuse_foreign_shards(corpus)
    (corpus / _BUILD).mkdir(parents=True, exist_ok=True)
    with (corpus / _BUILD / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is building {corpus}; wait for it, or set another corpus.path") from error
        except OSError:
            pass  # Some cluster file systems have no locks; two builds there do double work and write the same bytes.
        yield


def _refuse_foreign_shards(corpus: Path) -> None:
    for split in SPLITS:
        for tar in sorted((corpus / split).glob("*.tar")):
            if not tar.with_name(tar.stem + ".index.npy").is_file():
                raise UserError(
                    f"{tar} was not made by a build, and a build would write beside it; set another corpus.path, or "
                    "delete the folder if it is not needed"
                )


class _Build:
    """A build at work: what its steps share. Made inside the lock."""

    def __init__(self, config: CorpusConfig, inputs: Inputs, key: str, report: BuildProgress) -> None:
        self.config, self.inputs, self.key, self.report = config, inputs, key, report
        self.corpus, self.state = config.path, _state_digest(inputs, key)
        self.records = self.corpus / _BUILD / self.state[:16]
        """Folder of what is finished."""
        self._drop_other_records()
        self.continuing = " (continuing)" if any(self.records.iterdir()) else ""

    def run(self) -> Manifest:
        """Take all steps, the manifest last."""
        found = scan(self.config, self.inputs, self.report)
        tokenizer, sample_sha256 = self._tokenizer(found)
        sources = tuple(source.name for source in found.sources)
        digest = sha256_of(self.corpus / TOKENIZER)
        place = Workplace(self.corpus, self.records, digest, self.config.shard_bytes, sources)
        results = self._encode(found, tokenizer, place)
        given = self.config.tokenizer
        entry = TokenizerEntry(
            sha256=digest,
            kind="existing" if given.model else given.kind,
            vocab_size=tokenizer.vocab_size,
            sample_sha256=sample_sha256,
        )
        manifest = self._describe(found, entry, results)
        if _state_digest(self.inputs, self.key) != self.state:
            raise UserError(RAW_FILES_CHANGED)
        _remove_leftovers(self.corpus, manifest)
        sealed = save_manifest(self.corpus, manifest)
        shutil.rmtree(self.corpus / _BUILD, ignore_errors=True)
        return sealed

    def _drop_other_records(self) -> None:
        """Delete records of another state, and what was written half."""
        for other in (self.corpus / _BUILD).iterdir():
            if other.is_dir() and other != self.records:
                shutil.rmtree(other)
        self.records.mkdir(exist_ok=True)
        for folder in (self.corpus, self.records, *(self.corpus / split for split in SPLITS)):
            for temporary in folder.glob(".*.tmp"):
                temporary.unlink()

    def _tokenizer(self, found: Scan) -> tuple[Tokenizer, str | None]:
        """Return the tokenizer, and the sha256 of the texts that it was trained on, if there were any."""
        given, path, note = self.config.tokenizer, self.corpus / TOKENIZER, self.records / "tokenizer.json"
        if note.is_file() and path.is_file() and json.loads(note.read_text())["sha256"] == sha256_of(path):
            self.report("tokenizer (continuing)", 1, 1, 0)
            return Tokenizer(path), json.loads(note.read_text()).get("sample_sha256")
        sample = hashlib.sha256()
        if given.model:
            Tokenizer(given.model)
            with atomic_path(path) as temporary:
                shutil.copyfile(given.model, temporary)
        else:
            wanted = {} if given.kind == "protein" else sampled_characters(found, training_characters(given))
            total = sum(wanted.values())
            self.report("tokenizer", 0, total, 0)
            numbered = enumerate(all_documents(self.config, self.inputs)) if wanted else ()
            texts = (document.text[: wanted[number]] for number, document in numbered if number in wanted)
            train_tokenizer(_hashed(texts, sample), given, path)
            self.report("tokenizer", total, total, 0)
        sample_sha256 = None if given.model or given.kind == "protein" else sample.hexdigest()
        write_json(note, {"sha256": sha256_of(path), "sample_sha256": sample_sha256})
        return Tokenizer(path), sample_sha256

    def _encode(self, found: Scan, tokenizer: Tokenizer, place: Workplace) -> dict[ShardGroup, GroupRecord]:
        """Return the records of all groups, after building those that have none."""
        # A token of trained text is rarely shorter than two bytes; a residue is one token of one byte.
        is_protein = self.config.tokenizer.kind == "protein"
        groups = plan_groups(found, self.config, 1.0 if is_protein else np.dtype(tokenizer.token_dtype).itemsize / 2)
        everything = [ShardGroup(split, number) for split in SPLITS for number in range(len(groups[split]))]
        results = {group: record for group in everything if (record := _finished_record(place, group))}

        done = Counter[str]()

        def tell(records: Iterable[GroupRecord]) -> None:
            for record in records:
                done.update(characters=record.characters, documents=record.documents)
            text_bytes = round(done["characters"] * found.bytes_per_character)
            self.report(f"encoding{self.continuing}", text_bytes, found.total_bytes, done["documents"])

        def finished(group: ShardGroup, record: GroupRecord) -> None:
            results[group] = record
            tell([record])

        tell(results.values())
        missing = {group for group in everything if group not in results}
        if missing:
            processes = min(self.config.processes or os.cpu_count() or 1, len(missing))
            tasks = deal_to_groups(all_documents(self.config, self.inputs), found, groups, missing)
            build_groups(place, tasks, processes, finished)
        return {group: results[group] for group in everything}

    def _describe(self, found: Scan, tokenizer: TokenizerEntry, results: dict[ShardGroup, GroupRecord]) -> Manifest:
        """Return the manifest, after writing the token counts that it refers to."""
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        splits = {}
        for index, split in enumerate(SPLITS):
            records = [record for group, record in results.items() if group.split == split]
            shards = [shard for record in records for shard in record.shards]
            histogram = sum((Counter(record.length_histogram) for record in records), Counter[int]())
            splits[split] = SplitEntry(
                documents=found.count(split),
                characters=int(found.characters[found.splits == index].sum()),
                tokens=sum(shard.tokens for shard in shards),
                length_histogram=dict(sorted(histogram.items())),
                shards=shards,
            )
            if split == "train":
                counts += np.sum([record.token_counts for record in records], axis=0, dtype=np.int64)
        return Manifest(
            tokenizer=tokenizer,
            token_dtype=token_dtype(tokenizer.vocab_size),
            token_counts_sha256=save_token_counts(self.corpus, counts),
            split_rule=_split_rule(self.config),
            sources=found.sources,
            splits=splits,
            build_key=self.key,
        )


def _state_digest(inputs: Inputs, key: str) -> str:
    """Return a digest of what finished shards depend on besides the key: when raw files were written, who encodes."""
    state = {
        "build_key": key,
        "modified_ns": [[file.path.stat().st_mtime_ns for file in files] for files in inputs],
        "versions": [version("sentencepiece"), version("numpy"), version("webdataset")],
    }
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _hashed(texts: Iterable[str], into: "hashlib._Hash") -> Iterator[str]:
    """Yield the same texts; each is added to the digest, after its length, as it is taken."""
    for text in texts:
        content = text.encode()
        into.update(len(content).to_bytes(8, "little") + content)
        yield text


def _finished_record(place: Workplace, group: ShardGroup) -> GroupRecord | None:
    path = group.record_path(place.records)
    if not path.is_file():
        return None
    record = GroupRecord.model_validate_json(path.read_bytes())
    return None if any(verify_shard(place.corpus, entry) for entry in record.shards) else record


def _split_rule(config: CorpusConfig) -> SplitRule:
    rule = SplitRule(valid=config.splits.valid, test=config.splits.test)
    given = [f"{source_name(source)} to {source.split}" for source in config.sources if source.split]
    return rule.model_copy(update={"hash": f"{rule.hash}; given: {', '.join(given)}"}) if given else rule


def _remove_leftovers(corpus: Path, manifest: Manifest) -> None:
    """Delete shards that an earlier, unfinished build of other settings made."""
    kept = manifest.shard_files
    for split in SPLITS:
        for path in (corpus / split).glob("shard-*"):
            if _OWN_SHARD.fullmatch(path.name) and f"{split}/{path.name}" not in kept:
                path.unlink()
