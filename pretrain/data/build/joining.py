"""Corpora that are not built from text: token shards of others with a manifest, and several corpora as one.

Neither copies a token that it can link to, and both write the manifest last.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pretrain.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKEN_COUNTS,
    TOKENIZER,
    Manifest,
    ShardEntry,
    SourceEntry,
    Split,
    SplitEntry,
    SplitRule,
    TokenizerEntry,
    load_manifest,
    save_manifest,
)
from pretrain.data.shards.shard import read_npy_header, verify_shard
from pretrain.data.tar import tar_members
from pretrain.data.tokenizer import BOS, EOS, MASK, PAD, Tokenizer
from pretrain.errors import UserError
from pretrain.files import atomic_path, sha256_of

Ints = npt.NDArray[np.int64]


def index_shards(corpus: Path, shards: Mapping[Split, Sequence[Path]], tokenizer: Path, name: str) -> Manifest:
    """Make a corpus of WebDataset tars that hold token ids as .npy; the tars stay where they are.

    A begin symbol at the beginning of a document and an end symbol at its end are left out, since rows get their own.

    Args:
        corpus: folder to make, with links to the tars, their indexes and the manifest.
        shards: tars of each split; documents are not moved between them.
        tokenizer: the sentencepiece model that the ids are of.
        name: what the corpus calls the source.

    Raises:
        UserError: a damaged tar, members that are no token ids, ids outside the vocabulary, or a folder in use.
    """
    _refuse_existing(corpus)
    vocabulary = Tokenizer(tokenizer)
    counts, dtypes, entries, lengths = np.zeros(vocabulary.vocab_size, dtype=np.int64), set[str](), {}, {}
    corpus.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        entries[split], lengths[split] = list[ShardEntry](), list[int]()
        for number, tar in enumerate(shards.get(split, ())):
            index, dtype, of_shard = _index_ids(tar, vocabulary.vocab_size)
            dtypes.add(dtype)
            counts += of_shard if split == "train" else 0
            lengths[split] += index[:, 1].tolist()
            relative = f"{split}/shard-{number:06d}.tar"
            entries[split].append(_add_shard(corpus, relative, tar, index, _symlink))
    if not entries["train"] or len(dtypes) != 1:
        raise UserError(f"the shards hold ids of {', '.join(sorted(dtypes)) or 'no type'}; expected one type in all")
    shutil.copyfile(tokenizer, corpus / TOKENIZER)
    splits = {
        split: SplitEntry(
            documents=len(lengths[split]),
            characters=0,
            tokens=sum(lengths[split]),
            length_histogram=dict(sorted(Counter(1 << (max(n, 1) - 1).bit_length() for n in lengths[split]).items())),
            shards=entries[split],
        )
        for split in SPLITS
    }
    files, documents = sum(map(len, entries.values())), sum(map(len, lengths.values()))
    return _seal(
        corpus,
        counts,
        Manifest(
            tokenizer=TokenizerEntry(sha256=sha256_of(tokenizer), kind="existing", vocab_size=vocabulary.vocab_size),
            token_dtype=dtypes.pop(),  # type: ignore[arg-type]
            token_counts_sha256="0" * 64,
            split_rule=SplitRule(hash="none: whole shards, as given", valid=0, test=0),
            sources=[SourceEntry(name=name, files=files, documents=documents, characters=0, skipped={})],
            splits=splits,
        ),
    )


def _index_ids(tar: Path, vocab_size: int) -> tuple[Ints, str, Ints]:
    """Index int64 [samples, 3], name of the type, and how often each id occurs."""
    rows, counts, dtypes = [], np.zeros(vocab_size, dtype=np.int64), set[str]()
    others = set[str]()
    try:
        with tar.open("rb") as archive:
            for member in tar_members(archive, str(tar)):
                if not member.name.endswith(".npy"):
                    others.add(Path(member.name).suffix)
                    continue
                begin, count, dtype = read_npy_header(member, str(tar))
                ids = np.frombuffer(member.content, dtype, count, begin)
                where = f"{tar}: member {member.name}"
                if count and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
                    raise UserError(f"{where} has ids outside the {vocab_size} of the tokenizer; give the right one")
                first = int(count > 0 and ids[0] == BOS)
                last = count - int(count > first and ids[-1] == EOS)
                if np.isin(ids[first:last], (PAD, BOS, EOS, MASK)).any():
                    raise UserError(f"{where} has padding, [MASK], begin or end symbols inside; store documents alone")
                dtypes.add(dtype.name)
                counts += np.bincount(ids[first:last], minlength=vocab_size)
                rows.append((member.offset + begin + first * dtype.itemsize, last - first, 0))
    except OSError as error:
        raise UserError(f"{tar} cannot be read: {error.strerror or error}") from error
    if not rows:
        raise UserError(
            f"{tar} has no .npy members with token ids (it has {', '.join(sorted(others)) or 'nothing'}). Shards of "
            ".txt or .json are sources of a build: name them in corpus.sources and run `diptych data build`"
        )
    if len(dtypes) > 1:
        raise UserError(f"{tar} holds ids of {', '.join(sorted(dtypes))}; expected one type")
    return np.array(rows, dtype=np.int64), dtypes.pop(), counts


def merge_corpora(corpus: Path, parts: Sequence[Path], *, same_sources: bool = False) -> Manifest:
    """Make one corpus of several that share tokenizer and split rule; shards are hard links where possible.

    Equal documents fall into the same split in all parts, but are not removed. It is made beside its place and moved
    there when it is whole, so what was interrupted is made anew.

    Args:
        corpus: folder to make.
        parts: corpora to join.
        same_sources: they were built from parts of the same sources, in the same order; otherwise each has its own.

    Raises:
        UserError: other tokenizers, split rules or types of ids, a damaged shard, or a folder in use.
    """
    _refuse_existing(corpus)
    manifests = [load_manifest(part) for part in parts]
    rules = [m.split_rule for m in manifests]
    for what, values in (
        ("tokenizers", [m.tokenizer.sha256[:12] for m in manifests]),
        ("split rules", [f"{rule.hash} (valid {rule.valid}, test {rule.test})" for rule in rules]),
        ("types of ids", [m.token_dtype for m in manifests]),
    ):
        if len(set(values)) != 1:
            listed = "\n".join(f"  {part}: {value}" for part, value in zip(parts, values, strict=True))
            raise UserError(f"corpora of different {what} cannot be merged:\n{listed}")
    counts = np.sum([np.load(part / TOKEN_COUNTS, allow_pickle=False) for part in parts], axis=0)
    place = corpus.with_name(f".{corpus.name}.joining")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    splits = {split: _merge_split(place, parts, manifests, split, same_sources) for split in SPLITS}
    shutil.copyfile(parts[0] / TOKENIZER, place / TOKENIZER)
    lists = [manifest.sources for manifest in manifests]
    sources = [_sum(same) for same in zip(*lists, strict=True)] if same_sources else [s for some in lists for s in some]
    joined = manifests[0].model_copy(update={"sources": sources, "splits": splits, "build_key": None})
    sealed = _seal(place, counts, joined)
    place.replace(corpus)
    return sealed


def _sum(parts: Sequence[SourceEntry]) -> SourceEntry:
    """One source of which each part has read some files."""
    return SourceEntry(
        name=parts[0].name,
        files=sum(part.files for part in parts),
        documents=sum(part.documents for part in parts),
        characters=sum(part.characters for part in parts),
        skipped=dict(sum((Counter(part.skipped) for part in parts), Counter[str]())),
    )


def _merge_split(
    corpus: Path, parts: Sequence[Path], manifests: Sequence[Manifest], split: Split, same_sources: bool
) -> SplitEntry:
    of_parts = [manifest.splits[split] for manifest in manifests]
    entries: list[ShardEntry] = []
    first_source = 0
    for part, manifest in zip(parts, manifests, strict=True):
        for entry in manifest.splits[split].shards:
            if problem := verify_shard(part, entry):
                raise UserError(f"{problem}; run `diptych data verify {part}`")
            index = np.load(part / entry.index_path, allow_pickle=False)
            index = index if index.shape[1] > 2 else np.column_stack((index, np.zeros(len(index), np.int64)))
            index[:, 2] += first_source
            relative = f"{split}/shard-{len(entries):06d}.tar"
            entries.append(_add_shard(corpus, relative, part / entry.path, index, _hard_link))
        first_source += 0 if same_sources else len(manifest.sources)
    histogram = sum((Counter(entry.length_histogram) for entry in of_parts), Counter[int]())
    return SplitEntry(
        documents=sum(entry.documents for entry in of_parts),
        characters=sum(entry.characters for entry in of_parts),
        tokens=sum(entry.tokens for entry in of_parts),
        length_histogram=dict(sorted(histogram.items())),
        shards=entries,
    )


def _refuse_existing(corpus: Path) -> None:
    if corpus.is_dir() and any(corpus.iterdir()):
        state = "is a corpus already" if (corpus / MANIFEST).is_file() else "is not empty"
        raise UserError(f"{corpus} {state}; name a new folder, or delete this one")


def _add_shard(corpus: Path, relative: str, tar: Path, index: Ints, link: Callable[[Path, Path], None]) -> ShardEntry:
    target = corpus / relative
    target.parent.mkdir(parents=True, exist_ok=True)
    link(tar.resolve(), target)
    index_path = target.with_name(target.name.removesuffix(".tar") + ".index.npy")
    with atomic_path(index_path) as temporary, temporary.open("wb") as file:
        np.save(file, index)
    return ShardEntry(
        path=relative,
        bytes=target.stat().st_size,
        sha256=sha256_of(target),
        index_sha256=sha256_of(index_path),
        samples=len(index),
        tokens=int(index[:, 1].sum()),
    )


def _symlink(source: Path, target: Path) -> None:
    target.symlink_to(source)


def _hard_link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _seal(corpus: Path, counts: Ints, manifest: Manifest) -> Manifest:
    with atomic_path(corpus / TOKEN_COUNTS) as temporary, temporary.open("wb") as file:
        np.save(file, counts)
    update = {"token_counts_sha256": sha256_of(corpus / TOKEN_COUNTS)}
    return save_manifest(corpus, manifest.model_copy(update=update))
