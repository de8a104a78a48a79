"""Opening a shard for a run: from the corpus or fetched, checked once per node, damaged or not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pretrain.config.run import RunConfig
from pretrain.data.fetching import FetchRule, NotThereError, default_cache
from pretrain.data.manifest import Manifest, ShardEntry
from pretrain.data.shards.remote import RemoteShards
from pretrain.data.shards.shard import DamagedShardError, Shard
from pretrain.data.shards.verified import VerifiedShards


@dataclass(frozen=True)
class ShardAccess:
    """How shards are found and checked, and what happens to a damaged one."""

    verified: VerifiedShards = field(default_factory=lambda: VerifiedShards(None))
    on_corrupt: Literal["error", "skip"] = "error"
    remote: RemoteShards | None = None

    @classmethod
    def of_run(cls, config: RunConfig, manifest: Manifest) -> "ShardAccess":
        """Return the access that the run's config asks for."""
        cache, data = config.data.cache or default_cache(), config.data
        remote = None
        if config.corpus.url:
            rule = FetchRule(data.fetch_timeout_s, data.fetch_attempts)
            remote = RemoteShards(config.corpus.url, cache, manifest.fingerprint, data.cache_bytes, rule)
        return cls(VerifiedShards(cache), data.on_corrupt, remote)

    def open(self, corpus: Path, entry: ShardEntry, token_dtype: str) -> Shard:
        """Return a verified shard; one that was fetched and is damaged is fetched once more.

        Raises:
            DamagedShardError: it is not what the manifest says, here or at the other side.
            UserError: the other side cannot be reached.
        """
        if self.remote is None or (corpus / entry.path).is_file():
            return Shard(corpus, entry, token_dtype, self.verified.problem)
        try:
            folder = self.remote.ensure(entry)
            try:
                return Shard(folder, entry, token_dtype, self.verified.problem)
            except (DamagedShardError, FileNotFoundError):
                # Damaged in the cache, or deleted there for want of room just now.
                return Shard(self.remote.ensure(entry, again=True), entry, token_dtype, self.verified.problem)
        except NotThereError as error:
            raise DamagedShardError(f"{error}. With data.on_corrupt=skip the run goes on without it") from error

    def fetch_ahead(self, corpus: Path, entry: ShardEntry) -> None:
        """Begin to fetch a shard in the background, if it lies elsewhere."""
        if self.remote is not None and not (corpus / entry.path).is_file():
            self.remote.fetch_ahead(entry)
