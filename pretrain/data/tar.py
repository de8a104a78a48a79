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
    """Place of its first byte in the (unpacked) archive."""
    content: bytes


class _Blocks:
    """Archive as it is read, front to back and in whole blocks."""

    def __init__(self, archive: BinaryIO, label: str) -> None:
        self.archive, self.label, self.offset = archive, label, 0

    def header(self) -> bytes | None:
        """Read a member's header and check it; None at the end, which must be one."""
        header = self.archive.read(_BLOCK)
        if not header.strip(b"\0"):
            if len(header) < _BLOCK:
                raise UserError(f"{self.label} is cut off: no end of the archive at byte {self.offset:,}")
            while rest := self.archive.read(2**20):
                if rest.strip(b"\0"):
                    raise UserError(f"{self.label} is damaged: something follows its end at byte {self.offset:,}")
            return None
        if len(header) < _BLOCK:
            raise UserError(f"{self.label} is cut off: it ends inside a header at byte {self.offset + len(header):,}")
        if self.number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise UserError(f"{self.label} is damaged: the header at byte {self.offset:,} has a wrong checksum")
        return header

    def number(self, field: bytes) -> int:
        """Read a number of the header at hand."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        try:
            return int(field.strip(b" \0") or b"0", 8)
        except ValueError as error:
            raise UserError(
                f"{self.label} is damaged, or no tar: the header at byte {self.offset:,} holds no number"
            ) from error

    def content(self, size: int, name: str) -> bytes:
        """Read the content of member `name`."""
        padded = -(-size // _BLOCK) * _BLOCK
        content = self.archive.read(padded)
        if len(content) < padded:
            raise UserError(
                f"{self.label} is cut off: it ends inside member {name!r} at byte {self.offset + len(content):,}"
            )
        self.offset += padded
        return content[:size]


def tar_members(archive: BinaryIO, label: str, largest: int = 2**31) -> Iterator[TarMember]:
    """Yield all regular files, in order.

    Args:
        archive: only read from, front to back.
        label: names it in errors.
        largest: bytes of a member above which the archive is refused.

    Raises:
        UserError: a header whose checksum is wrong, a member cut off, no end of the archive, or something too large.
    """
    blocks, long_name = _Blocks(archive, label), None
    while (header := blocks.header()) is not None:
        size, kind, name = blocks.number(header[124:136]), header[156:157], _text(header[:100])
        blocks.offset += _BLOCK
        extended = kind in (_LONG_NAME, _PAX, _PAX_GLOBAL)
        if size > (_LARGEST_EXTENDED_HEADER if extended else largest):
            raise UserError(
                f"{label}: a {'header' if extended else 'member'} of {size:,} bytes at byte {blocks.offset:,}"
            )
        begin, content = blocks.offset, blocks.content(size, name)
        if kind == _LONG_NAME:
            long_name = _text(content)
        elif kind == _PAX:
            long_name = _pax_path(content) or long_name
        elif kind in (b"0", b"\0"):
            prefix = _text(header[345:500]) if header[257:262] == b"ustar" and header[263:265] == b"00" else ""
            yield TarMember(long_name or "/".join(filter(None, (prefix, name))), begin, content)
            long_name = None
        elif kind != _PAX_GLOBAL:
            long_name = None


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
