"""What a corpus is: its tokenizer, splits, shards, counts and digests, in one `manifest.json`.

The manifest is written last, so a folder with a manifest is a finished corpus. Its fingerprint covers everything
else in it, and therefore every byte of every shard; a checkpoint remembers it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.data.arrays import Ints
from pretrain.errors import UserError
from pretrain.files import atomic_path, sha256_of, write_json

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
TOKEN_COUNTS = "token_counts.npy"
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(_Entry):
    """One WebDataset tar and the index beside it."""

    path: Annotated[str, Field(pattern=r"^(train|valid|test)/[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar$")]
    """Relative to the corpus folder, for instance train/shard-000000.tar; never outside of it."""
    bytes: int
    sha256: Digest
    index_sha256: Digest
    """Digest of the index file, int64 [samples, 3]: byte offset of the first token in the tar, number of tokens, number
    of the source in `Manifest.sources`."""
    samples: int
    tokens: int

    @property
    def index_path(self) -> str:
        """Path of the index file, relative as well."""
        return self.path.removesuffix(".tar") + ".index.npy"


class SplitEntry(_Entry):
    """One of train, valid, test."""

    documents: int
    characters: int
    tokens: int
    length_histogram: dict[int, int]
    """Upper bound of tokens per document (a power of two) -> number of documents above half of it, up to it."""
    shards: list[ShardEntry]


class SourceEntry(_Entry):
    """What came from one source."""

    name: str
    files: int
    documents: int
    characters: int
    skipped: dict[str, int]
    """Reason -> number of records left out under `on_bad: skip`."""


class TokenizerEntry(_Entry):
    """The tokenizer that every id of the corpus refers to."""

    sha256: Digest
    kind: str
    vocab_size: int
    sample_sha256: Digest | None = None
    """Digest of the texts that it was trained on: of each, the number of its UTF-8 bytes (8 bytes, little-endian) and
    these."""


class SplitRule(_Entry):
    """A document's split is a pure function of its text, or, where `hash` says so, of its source."""

    hash: str = "blake2b-64 of the normalised text"
    valid: float
    test: float


class Manifest(_Entry):
    """A finished corpus."""

    format: Literal[1] = 1
    tokenizer: TokenizerEntry
    token_dtype: Literal["uint8", "uint16", "uint32", "int16", "int32", "int64"]
    """Little-endian; signed only in shards of others."""
    token_counts_sha256: Digest
    """Digest of token_counts.npy, int64 [vocab_size]: how often each id occurs in the training split."""
    split_rule: SplitRule
    sources: list[SourceEntry]
    splits: dict[Split, SplitEntry]
    build_key: Digest | None = None
    """Digest of the settings and the names and sizes of the raw files that the corpus was built from."""
    fingerprint: str = ""

    @property
    def shard_files(self) -> set[str]:
        """Relative paths of all shards and indexes."""
        shards = [shard for split in self.splits.values() for shard in split.shards]
        return {path for shard in shards for path in (shard.path, shard.index_path)}

    def computed_fingerprint(self) -> str:
        """sha256 over everything else in the manifest, as canonical JSON."""
        content = self.model_dump(mode="json", exclude={"fingerprint"})
        if self.tokenizer.sample_sha256 is None:
            del content["tokenizer"]["sample_sha256"]  # A manifest from before there was one keeps its fingerprint.
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def length_histogram(lengths: Iterable[int]) -> dict[int, int]:
    """Count documents by their tokens, as in `SplitEntry.length_histogram`."""
    return dict(sorted(Counter(1 << (max(length, 1) - 1).bit_length() for length in lengths).items()))


def save_token_counts(corpus: Path, counts: Ints) -> str:
    """Write how often each id occurs in the training split, int64 [vocab_size]; return the file's digest."""
    with atomic_path(corpus / TOKEN_COUNTS) as temporary, temporary.open("wb") as file:
        np.save(file, counts)
    return sha256_of(corpus / TOKEN_COUNTS)


def save_manifest(corpus: Path, manifest: Manifest) -> Manifest:
    """Seal the manifest with its fingerprint and write it atomically; the corpus is finished with this."""
    sealed = manifest.model_copy(update={"fingerprint": manifest.computed_fingerprint()})
    write_json(corpus / MANIFEST, sealed.model_dump(mode="json"))
    return sealed


def load_manifest(corpus: Path) -> Manifest:
    """Read `corpus/manifest.json` and check that its fingerprint and the tokenizer beside it belong to it.

    Raises:
        UserError: there is no corpus, the manifest was edited, or the tokenizer is another one.
    """
    path = corpus / MANIFEST
    if not path.is_file():
        state = "its build was not finished" if corpus.is_dir() else "there is no such folder"
        raise UserError(
            f"no corpus at {corpus} ({state}); build it with `diptych data build CONFIG`, or set corpus.path"
        )
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise UserError(f"{path} is not a corpus manifest of this version: {error}") from error
    if manifest.fingerprint != manifest.computed_fingerprint():
        raise UserError(f"{path} was changed after it was written: its fingerprint does not match; build it again")
    tokenizer = corpus / TOKENIZER
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer} is missing; restore it, or build the corpus again")
    found = sha256_of(tokenizer)
    if found != manifest.tokenizer.sha256:
        raise UserError(
            f"{tokenizer} does not belong to this corpus: its sha256 is {found[:12]}..., the corpus was encoded with "
            f"{manifest.tokenizer.sha256[:12]}...; restore the original, or build the corpus again"
        )
    return manifest
