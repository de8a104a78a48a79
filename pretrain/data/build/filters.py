"""Which documents a build leaves out, by rules that know no language."""

from pretrain.config.data import FilterConfig


def reason_to_remove(text: str, filters: FilterConfig) -> str | None:
    """What the manifest counts a removed document by; None for one that is kept."""
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
    """Letters of any script among the characters that are not white space; combining marks are not counted."""
    visible = "".join(text.split())
    return sum(map(str.isalpha, visible)) / max(len(visible), 1)


def share_of_repeated_lines(text: str) -> float:
    """Lines that stand in the text before, among those that are not blank."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    return 1 - len(set(lines)) / max(len(lines), 1)
