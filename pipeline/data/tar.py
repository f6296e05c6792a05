"""Walk through the headers of one uncompressed tar: where does each file begin, and is the archive whole.

GNU, PAX, USTAR and old V7 headers are read, with long names and large sizes. Every header's checksum, the end marker
and what follows it are checked, because the usual readers stop without a word at a damaged header, a cut or a second
archive. Formats: POSIX.1-2017 "pax Interchange Format", and the GNU tar manual, "Basic Tar Format".

What it gives up: archives that hide data behind links, devices, sparse maps or compression are refused by name, with
the command that makes them readable; a flipped bit inside a file's bytes is not seen here (the index keeps digests for
that).
"""

from __future__ import annotations

import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import DataError

BLOCK = 512  # bytes; tar counts in these
COMPRESSED = {  # first bytes of a file -> what it is, and the program that unpacks it to its standard output
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"\x1f\x9d": ("compress", "gzip -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"LZIP": ("lzip", "lzip -dc"),
    b"\xfd7zXZ\x00": ("xz", "xz -dc"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "zstd -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
    b"PK\x03\x04": ("zip, so no tar", ""),
}
REFUSED = {  # type flag -> what it is, and how to make the tar without it
    b"1": ("a hard link", "tar --hard-dereference -cf"),
    b"2": ("a symbolic link", "tar --dereference -cf"),
    b"3": ("a character device", "tar -cf of plain files only"),
    b"4": ("a block device", "tar -cf of plain files only"),
    b"6": ("a named pipe", "tar -cf of plain files only"),
    b"S": ("a sparse file", "tar -cf without --sparse"),
    b"M": ("a part of a multi-volume archive", "tar -cf without --multi-volume"),
}
FILES = (b"0", b"\0", b"7")  # type flags
SKIPPED = (b"5", b"D", b"V")  # folders, a volume's label
EXTENDED = (b"x", b"X", b"L", b"K", b"g")  # before a member: PAX, Solaris' PAX, GNU long name, long link, PAX for all
AGAIN = "copy or write it again"
ZEROS = bytes(BLOCK)


class Member(NamedTuple):
    """One file of a tar. name: as stored, without trailing NULs.  offset, length: of its bytes, in bytes."""

    name: str
    offset: int
    length: int


class _Bad(Exception):
    """What is wrong and how to mend it; `members` adds where."""


def members(tar: memoryview, path: Path | str) -> Iterator[Member]:
    """The files of a tar in their order; `path` is only for messages.

    Raises DataError, naming the tar, the place in bytes and the last good member, at a wrong checksum, a cut, a missing
    end marker, bytes after it, and at members that are not plain files (folders are skipped).
    """
    place, last, extra = 0, "none", {}
    try:
        while True:
            header = bytes(tar[place : place + BLOCK])
            if len(header) < BLOCK:
                raise _Bad(f"the tar ends without its end marker, so it was cut; {AGAIN}")
            if header == ZEROS:
                break
            _check_sum(header)
            kind = header[156:157]
            describes_next = kind in EXTENDED
            size = int(extra["size"]) if "size" in extra and not describes_next else _number(header[124:136])
            begin, end = place + BLOCK, place + BLOCK + size
            if size < 0:
                raise _Bad(f"a member of {size} bytes, the tar is damaged from here; {AGAIN}")
            if end > len(tar):
                raise _Bad(f"the tar is cut inside the next member, {end - len(tar)} bytes are missing; {AGAIN}")
            if describes_next:
                extra |= _extended(bytes(tar[begin:end]), kind)
            else:
                name = extra.get("path") or _name(header)
                if extra and any(key.startswith("GNU.sparse.") for key in extra):
                    kind, name = b"S", extra.get("GNU.sparse.name", name)
                if kind in FILES and not name.endswith("/"):
                    _check_name(name)
                    yield Member(name, begin, size)
                elif kind not in FILES and kind not in SKIPPED:
                    what, mend = REFUSED.get(kind, (f"of unknown type {kind!r}", "tar -cf of plain files only"))
                    raise _Bad(f"member {name} is {what}, only plain files are read; make the tar with `{mend}`")
                last, extra = name, {}
            place = begin + (size + BLOCK - 1) // BLOCK * BLOCK
        _check_end(tar, place)
    except _Bad as bad:
        compressed = _compressed(tar, path) if not place else None  # a good tar begins with a name, which may be any
        raise DataError(compressed or f"{path}: at byte {place}, after member {last}: {bad}") from None


def _compressed(tar: memoryview, path: Path | str) -> str | None:
    """What a file that is no tar says of itself in its first bytes, with the command that makes a tar of it."""
    for magic, (what, command) in COMPRESSED.items():
        if tar[: len(magic)] == magic:
            name, plain = shlex.quote(str(path)), shlex.quote(f"{path}.plain")
            unpack = f"unpack it: `{command} {name} > {plain} && mv {plain} {name}`"
            unpack = unpack if command else "`unzip` it into a folder, and `tar -cf` that"
            return f"{path}: compressed ({what}); samples are read at their places, so {unpack}"
    return None


def _check_sum(header: bytes) -> None:
    """The stored sum of all bytes of the header, its own field counted as spaces."""
    field = header[148:156]
    stored = _number(field)
    # The lower half of Adler-32 is (1 + sum of bytes) mod 65521, many times faster than sum(); few headers reach that.
    if (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + 8 * 32 == stored:
        return
    rest = header[:148] + header[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in rest)  # as some old writers did
    if stored - 8 * 32 not in (sum(rest), signed):
        raise _Bad(f"wrong header checksum, the tar is damaged from here; {AGAIN}")


def _check_end(tar: memoryview, place: int) -> None:
    """Two blocks of zeros, and nothing but zeros behind them."""
    if len(tar) < place + 2 * BLOCK:
        raise _Bad(f"half of the end marker is missing, so the tar was cut; {AGAIN}")
    for at in range(place, len(tar), 1 << 20):
        if bytes(tar[at : at + (1 << 20)]).strip(b"\0"):
            raise _Bad(
                "there is an end marker, and more bytes after it: zeroed blocks, or archives joined by `cat`; "
                "copy it again, or join with `tar --concatenate`"
            )


def _number(field: bytes) -> int:
    """Octal digits, or base 256 when the first bit is set (GNU, for sizes from 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _Bad(f"not a tar header, the tar is damaged from here; {AGAIN}") from None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":  # GNU's own magic is "ustar " and has other things in the place of the prefix
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _check_name(name: str) -> None:
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        raise _Bad(f"member {name} points outside of its folder; make the tar with `tar -C FOLDER -cf SHARD.tar .`")


def _extended(body: bytes, kind: bytes) -> dict[str, str]:
    """The next member's name and size: a GNU long name, or PAX records of "length key=value" and a line feed."""
    if kind in (b"K", b"g"):  # a link's target, and links are refused; what is said of all members is never their name
        return {}
    if kind == b"L":
        return {"path": body.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found, place = {}, 0
    while place < len(body):
        digits = body[place : place + 20].partition(b" ")[0]
        record = body[place : place + int(digits)] if digits.isdigit() else b""
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or record[-1:] != b"\n" or (key == b"size" and not value.isdigit()):
            raise _Bad(f"a PAX header that cannot be read, the tar is damaged; {AGAIN}")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place += len(record)
    return found
