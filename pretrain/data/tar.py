"""The regular files of a tar archive, read one after another and never extracted.

Stricter and simpler than `tarfile`, for archives that nobody vouches for: links, devices and folders are passed over,
names are only names, an extended header has a limit, and whatever does not add up is an error instead of an end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from pretrain.errors import UserError

_BLOCK = 512


_LONG_NAME, _PAX, _PAX_GLOBAL = b"L", b"x", b"g"


_LARGEST_EXTENDED_HEADER = 2**16


@dataclass(frozen=True)
class TarMember:
    """A regular file in an archive."""

    name: str
    offset: int
    """Of its first byte in the (unpacked) archive."""
    content: bytes


def tar_members(archive: BinaryIO, label: str, largest: int = 2**31) -> Iterator[TarMember]:
    """All regular files, in order.

    Args:
        archive: only read from, front to back.
        label: names it in errors.
        largest: bytes of a member above which the archive is refused.

    Raises:
        UserError: a header whose checksum is wrong, a member cut off, no end of the archive, or something too large.
    """
    offset, long_name = 0, None

    def take(size: int, what: str) -> bytes:
        nonlocal offset
        padded = -(-size // _BLOCK) * _BLOCK
        content = archive.read(padded)
        if len(content) < padded:
            raise UserError(f"{label} is cut off: it ends inside {what} at byte {offset + len(content):,}")
        offset += padded
        return content[:size]

    while True:
        header = archive.read(_BLOCK)
        if not header.strip(b"\0"):
            if len(header) < _BLOCK:
                raise UserError(f"{label} is cut off: no end of the archive at byte {offset:,}")
            while rest := archive.read(2**20):
                if rest.strip(b"\0"):
                    raise UserError(f"{label} is damaged: something follows its end at byte {offset:,}")
            return
        if len(header) < _BLOCK:
            raise UserError(f"{label} is cut off: it ends inside a header at byte {offset + len(header):,}")
        _check(header, label, offset)
        offset += _BLOCK
        size, kind = _number(header[124:136], label, offset), header[156:157]
        extended = kind in (_LONG_NAME, _PAX, _PAX_GLOBAL)
        if size > (_LARGEST_EXTENDED_HEADER if extended else largest):
            raise UserError(f"{label}: a {'header' if extended else 'member'} of {size:,} bytes at byte {offset:,}")
        begin, content = offset, take(size, f"member {_text(header[:100])!r}")
        if kind == _LONG_NAME:
            long_name = _text(content)
        elif kind == _PAX:
            long_name = _pax_path(content) or long_name
        elif kind in (b"0", b"\0"):
            prefix = _text(header[345:500]) if header[257:262] == b"ustar" and header[263:265] == b"00" else ""
            yield TarMember(long_name or "/".join(filter(None, (prefix, _text(header[:100])))), begin, content)
            long_name = None
        elif kind != _PAX_GLOBAL:
            long_name = None


def _check(header: bytes, label: str, offset: int) -> None:
    expected = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156], label, offset) != expected:
        raise UserError(f"{label} is damaged: the header at byte {offset:,} has a wrong checksum")


def _number(field: bytes, label: str, offset: int) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise UserError(f"{label} is damaged, or no tar: the header at byte {offset:,} holds no number") from error


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _pax_path(content: bytes) -> str | None:
    while content:
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            return None
        key, _, value = rest[: int(length) - len(length) - 1].partition(b"=")
        if key == b"path":
            return value.rstrip(b"\n").decode("utf-8", "replace")
        content = content[int(length) :]
    return None
