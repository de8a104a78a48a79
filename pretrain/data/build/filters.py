"""Which documents a build leaves out: by rules that know no language, and for equal ones that came before."""

from pretrain.config.data import CorpusConfig, FilterConfig
from pretrain.data.manifest import Split


class Sieve:
    """Decides about the documents of a build, each in its turn."""

    def __init__(self, config: CorpusConfig) -> None:
        self._filters = config.filters
        self._seen: set[int] = set()
        self._placed: dict[int, Split] | None = {} if any(source.split for source in config.sources) else None

    def reason_to_remove(self, text: str, text_hash: int, split: Split) -> str | None:
        """Return what the manifest counts a removed document by; None for one that is kept."""
        if reason := reason_to_remove(text, self._filters):
            return reason
        if self._filters.deduplicate:
            if text_hash in self._seen:
                return "duplicate"
            self._seen.add(text_hash)
        placed = split if self._placed is None else self._placed.setdefault(text_hash, split)
        return None if placed == split else f"also in {placed}"


def reason_to_remove(text: str, filters: FilterConfig) -> str | None:
    """Return by which rule a text is removed; None if none applies."""
    if len(text) < filters.min_characters:
        return "too short"
    if filters.max_characters is not None and len(text) > filters.max_characters:
        return "too long"
    if filters.min_letters > 0 and share_of_letters(text) < filters.min_letters:
        return "too few letters"
    if filters.max_repeated_lines < 1 and share_of_repeated_lines(text) > filters.max_repeated_lines:
        return "repeated lines"
    return None


def share_of_letters(text: str) -> float:
    """Share of letters of any script among the characters that are not white space; combining marks are not counted."""
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) / max(len(visible), 1)


def share_of_repeated_lines(text: str) -> float:
    """Share of lines that stand in the text before, among those that are not blank."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    return 1 - len(set(lines)) / max(len(lines), 1)
