"""The sections `corpus` and `data`: how raw documents become a corpus, and how its shards become rows."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pretrain.config.section import AbsolutePath, Count, Fixed, Section, Share


def _absolute_unless_url(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


class SourceConfig(Section):
    """One set of raw files to read documents from."""

    path: Annotated[str, AfterValidator(_absolute_unless_url)]
    """A file, a folder (read recursively) or a glob, relative to the working directory; or a URL (http, https, and with
    patterns s3, gs and others), which is fetched once into the user's cache folder."""
    format: Literal["auto", "text", "jsonl", "fasta", "parquet", "webdataset"] = "auto"
    """`auto` decides by the name: .txt, .jsonl, .fasta, .fa, .faa, .parquet or .tar, each also with .gz or .zst (but
    parquet). A WebDataset tar gives a document for each sample with a .txt, or a .json with the text field."""
    name: str | None = None
    """What the corpus calls this source; by default the last part of the path."""
    separator: str | None = None
    """Text only: a regular expression; every line that it matches starts a new document. Without it, a file is one.
    `^\\s*$` splits at blank lines, which then belong to no document."""
    text_field: str = "text"
    """JSON and parquet only: the field that holds the text."""
    id_field: str = "id"
    """JSON and parquet only: the field that holds the document's id; the line number where it is absent."""
    metadata_fields: list[str] = Field(default=[])
    """JSON and parquet only: fields that are kept with each document, as `metadata` in its .json in the shard. A record
    of JSON may lack some of them."""
    split: Literal["train", "valid", "test"] | None = None
    """Split that all documents of this source go to, instead of being split by hash. Nothing else goes into a `valid`
    or `test` that has such sources, and what is in there is taken out of every other split."""


class TokenizerConfig(Section):
    """The sentencepiece model that turns text into ids."""

    kind: Literal["unigram", "bpe", "protein"] = "unigram"
    """`protein` has one piece per residue (20 amino acids and B, Z, X, U, O) and is not trained on the data."""
    vocab_size: Annotated[int, Field(ge=16, le=2**31)] = 4096
    """Pieces, special symbols and byte pieces included. Ignored for proteins (30)."""
    byte_fallback: bool = True
    """Spell characters that have no piece as bytes, so that no text is unknown. Not for proteins."""
    normalization: Literal["identity", "nfkc"] = "identity"
    """Unicode normalisation before tokenization."""
    sample_characters: Count = 50_000_000
    """Train on at most this many characters of the training split, chosen by document hash; 2,500 per piece suffice."""
    model: AbsolutePath | None = None
    """An existing sentencepiece model to use instead of training one."""


class SplitsConfig(Section):
    """Which share of the documents, by hash of their text, is held out."""

    valid: Share = 0.05
    """Share of documents in `valid`, watched during training."""
    test: Share = 0.05
    """Share of documents in `test`, read by the evaluation after training."""

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> "SplitsConfig":
        if self.valid + self.test >= 1:
            raise ValueError(f"valid + test = {self.valid + self.test:g} leaves nothing to train on")
        return self


class FilterConfig(Section):
    """Which documents a build leaves out; the manifest counts how many for each reason and source."""

    min_characters: Annotated[int, Field(ge=0)] = 0
    """Leave out shorter documents."""
    max_characters: Count | None = None
    """Leave out longer documents."""
    min_letters: Share = 0.0
    """Leave out documents in which fewer of the characters that are not white space are letters, of any script."""
    max_repeated_lines: Share = 1.0
    """Leave out documents in which more of the lines (blank ones not counted) stand in the document before."""
    deduplicate: bool = False
    """Keep only the first of documents whose text is equal but for white space, over all sources."""


class CorpusConfig(Section):
    """How `diptych data build` makes a corpus, and where it lies."""

    path: AbsolutePath
    """The corpus folder: tokenizer.model, manifest.json, and train/, valid/, test/ with WebDataset shards."""
    url: str | None = None
    """A corpus elsewhere (http, https, s3, gs, ...): what `path` lacks of it is fetched, shards into the node's cache
    as they are needed."""
    sources: list[SourceConfig] = Field(default=[])
    """Raw documents to build from. Empty: the corpus must exist already."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    splits: SplitsConfig = SplitsConfig()
    filters: FilterConfig = FilterConfig()
    shard_bytes: Annotated[int, Field(ge=2**16)] = 64 * 2**20
    """Largest size of a shard, except that a single document is never cut."""
    min_train_shards: Count = 64
    """Cut the training split into at least this many shards, so that every stream has one of its own."""
    on_bad: Literal["error", "skip"] = "error"
    """A record that cannot be read (not UTF-8, an illegal residue, ...): stop and name it, or skip and count it."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Processes that encode; 0 means one per core. The result does not depend on it."""


class DataConfig(Section):
    """How shards become rows."""

    sequence_length: Fixed[Annotated[int, Field(ge=8)]] = 128
    """Positions per row."""
    packing: Fixed[Literal["padded", "packed", "concatenated"]] = "padded"
    """`padded`: a row holds one document, or one piece of a longer one. `packed`: several, best fit, none cut that
    fits into a row. `concatenated`: documents one after another, cut wherever a row is full."""
    cut: Fixed[Literal["full", "even"]] = "full"
    """How `padded` and `packed` cut a document longer than a row: into full rows and a rest, or evenly."""
    streams: Fixed[Count] = 64
    """Logical streams that the order of rows is cut into; the number of ranks must divide it."""
    on_corrupt: Literal["error", "skip"] = "error"
    """A shard that is missing or not what the manifest says: stop and name it, or go on without its samples, on every
    rank alike, and count them."""
    cache: AbsolutePath | None = None
    """Folder on each node for what it has verified and fetched; by default `diptych` in the user's cache folder."""
    source_weights: Fixed[dict[str, Annotated[float, Field(ge=0)]]] = Field(default={})
    """Source -> how often its documents are read each time their shard is; 1 where not given. At 0.5 a document is
    read every other time, at 2 twice each time."""
    cache_bytes: Count = 100 * 2**30
    """Room for shards that were fetched, on each node; those opened longest ago go first."""
    fetch_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without a byte after which an attempt to fetch has failed."""
    fetch_attempts: Count = 8
    """Attempts to fetch a file, with growing pauses, before the run stops."""
    workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes per rank; 0 loads in the training process. The order of rows does not depend on it."""
    mask_rate: Fixed[Annotated[float, Field(gt=0, lt=1)]] = 0.2
    """Share of the tokens (special symbols excluded) that are to be predicted."""
    final_mask_rate: Fixed[Annotated[float, Field(gt=0, lt=1)] | None] = None
    """Rate at the end: if given, the rate goes linearly from `mask_rate` to this while `training.tokens` positions are
    dealt; padding counts here, since no rank knows what is in the rows of the others."""
    mask_unit: Fixed[Literal["token", "span", "whole_word"]] = "token"
    """What is masked as one: tokens, runs of tokens, or all pieces of a word. The share of tokens is the same."""
    mean_span_length: Fixed[Annotated[float, Field(gt=1)]] = 3.0
    """Tokens in a run, on average, for `mask_unit: span`; at least 1 / (1 - mask rate)."""
    mask_token_share: Fixed[Share] = 0.8
    """Share of the tokens to be predicted that [MASK] replaces."""
    random_token_share: Fixed[Share] = 0.1
    """Share of them that a random piece replaces; the rest stay as they are."""

    @property
    def largest_mask_rate(self) -> float:
        """Highest share of the tokens that is to be predicted at any time of the run."""
        return max(self.mask_rate, self.final_mask_rate or 0)

    @model_validator(mode="after")
    def _shares_fit(self) -> "DataConfig":
        if self.mask_token_share + self.random_token_share > 1:
            raise ValueError("mask_token_share + random_token_share is more than 1")
        rate = self.largest_mask_rate
        if self.mask_unit == "span" and self.mean_span_length < 1 / (1 - rate):
            raise ValueError(
                f"runs of mean_span_length = {self.mean_span_length:g} are too short for a mask rate of {rate:g}, "
                f"where single tokens make longer ones; use at least {1 / (1 - rate):.3g}"
            )
        return self
