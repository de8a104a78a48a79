"""Token shards of others as a corpus: they stay where they are and get indexes, links and a manifest beside."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pretrain.data.arrays import Ints
from pretrain.data.build.joining import refuse_existing
from pretrain.data.manifest import (
    SPLITS,
    TOKENIZER,
    Manifest,
    ShardEntry,
    SourceEntry,
    Split,
    SplitEntry,
    SplitRule,
    TokenizerEntry,
    length_histogram,
    save_manifest,
    save_token_counts,
)
from pretrain.data.shards.shard import add_index, read_npy_header
from pretrain.data.tar import tar_members
from pretrain.data.tokenizer import BOS, EOS, MASK, PAD, Tokenizer
from pretrain.errors import UserError
from pretrain.files import sha256_of


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
    refuse_existing(corpus)
    vocabulary = Tokenizer(tokenizer)
    counts, dtypes, splits = np.zeros(vocabulary.vocab_size, dtype=np.int64), set[str](), dict[Split, SplitEntry]()
    corpus.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        entries, lengths = list[ShardEntry](), list[int]()
        for number, tar in enumerate(shards.get(split, ())):
            index, dtype, of_shard = _index_ids(tar, vocabulary.vocab_size)
            dtypes.add(dtype)
            counts += of_shard if split == "train" else 0
            lengths += index[:, 1].tolist()
            relative = f"{split}/shard-{number:06d}.tar"
            (corpus / split).mkdir(exist_ok=True)
            (corpus / relative).symlink_to(tar.resolve())
            entries.append(add_index(corpus, relative, index))
        splits[split] = SplitEntry(
            documents=len(lengths),
            characters=0,
            tokens=sum(lengths),
            length_histogram=length_histogram(lengths),
            shards=entries,
        )
    if not splits["train"].shards or len(dtypes) != 1:
        raise UserError(f"the shards hold ids of {', '.join(sorted(dtypes)) or 'no type'}; expected one type in all")
    shutil.copyfile(tokenizer, corpus / TOKENIZER)
    files = sum(len(entry.shards) for entry in splits.values())
    documents = sum(entry.documents for entry in splits.values())
    manifest = Manifest(
        tokenizer=TokenizerEntry(sha256=sha256_of(tokenizer), kind="existing", vocab_size=vocabulary.vocab_size),
        token_dtype=dtypes.pop(),  # type: ignore[arg-type]
        token_counts_sha256=save_token_counts(corpus, counts),
        split_rule=SplitRule(hash="none: whole shards, as given", valid=0, test=0),
        sources=[SourceEntry(name=name, files=files, documents=documents, characters=0, skipped={})],
        splits=splits,
    )
    return save_manifest(corpus, manifest)


def _index_ids(tar: Path, vocab_size: int) -> tuple[Ints, str, Ints]:
    """Return the index int64 [samples, 3], the name of the ids' type, and how often each id occurs."""
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
