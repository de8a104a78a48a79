"""The section `parallel`: how one row is spread over ranks. How weights are is `training.sharding`."""

from collections.abc import Iterable
from dataclasses import dataclass

from pretrain.config.section import Count, Section


@dataclass(frozen=True)
class DataRank:
    """Place of a rank among those that read rows; ranks that share every row have the same one."""

    index: int = 0
    """Index of this one among them, from 0."""
    count: int = 1
    """How many there are."""

    def streams(self, total: int) -> range:
        """Return the streams, out of `total`, whose rows this rank reads."""
        return range(self.index, total, self.count)


SOLE_READER = DataRank()


class ParallelConfig(Section):
    """Which ranks work on the same rows."""

    sequence: Count = 1
    """S neighbouring ranks share every row, each with L/S of its positions (Ulysses, arXiv 2309.14509): for rows that
    one rank has no memory for. S must divide `model.num_heads`, every row length and the number of ranks."""

    def data_rank(self, rank: int, world_size: int) -> DataRank:
        """Return which rows a rank reads."""
        return DataRank(rank // self.sequence, self.data_ranks(world_size))

    def data_ranks(self, world_size: int) -> int:
        """Return how many ranks read different rows."""
        return world_size // self.sequence

    def check(self, num_heads: int, lengths: Iterable[int]) -> None:
        """Refuse what cannot be shared out among the ranks.

        Raises:
            ValueError: naming the number and what is allowed.
        """
        size = self.sequence
        if num_heads % size:
            allowed = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
            raise ValueError(
                f"parallel.sequence = {size} ranks cannot share model.num_heads = {num_heads} evenly (each takes both "
                f"sub-heads of some heads); use one of {allowed}, or another number of heads"
            )
        for length in lengths:
            if length % size:
                below = length // size * size
                nearest = f"{below} or {below + size}" if below else f"{size}"
                raise ValueError(
                    f"parallel.sequence = {size} ranks cannot share rows of {length} positions evenly; use a "
                    f"sequence_length that {size} divides, for instance {nearest}"
                )
