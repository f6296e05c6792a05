"""Memory that stands for a file of which only some pieces are here, each mapped from a file of its own.

A tar of a remote data set is one range of addresses, so whoever reads it need not know that it is in pieces. What is
not here reads as zeros, which no digest agrees with. Pieces are whole pages and may share the page at which they meet:
such pages are copied, and so are those that came before their piece; all others are mapped from the piece's file, whose
bytes stay for as long as they are mapped, even when the file is removed. Linux and macOS; mmap(2) says how one mapping
replaces another (MAP_FIXED).

What it gives up: it does not know who looks at a piece that is let go of; the caller does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import Counter
from itertools import pairwise

import numpy as np

PAGE = mmap.PAGESIZE
_FIXED, _NO_RESERVE = 0x10, getattr(mmap, "MAP_NORESERVE", 0)
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Span:
    """`size` bytes. view: all of them, read-only; it holds the memory, also when the span is gone."""

    def __init__(self, size: int) -> None:
        self.size = size
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        held = mmap.mmap(-1, max(size, 1), flags=flags, prot=mmap.PROT_READ)
        self.view = memoryview(held)[:size]
        self._address = int(np.frombuffer(held, np.uint8).ctypes.data)
        self._copied: Counter[int] = Counter()  # pages -> pieces that have them, 0: they came before theirs
        self._lock = threading.Lock()

    def map(self, begin: int, end: int, file: int, again: bool = False) -> None:
        """Bytes `begin` to `end`, from page to page or to the end of all, from an open file that holds just them.

        again: in place of bytes that are here and are wrong.
        """
        with self._lock:
            copied, runs = self._pages(begin, end)
            for page, count in runs:
                self._place(page, count, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, file, page * PAGE - begin)
            for page in copied:
                at = page * PAGE
                self._copy(page, os.pread(file, min(PAGE, end - at), at - begin), again)

    def fill(self, begin: int, end: int, content: memoryview, again: bool = False) -> None:
        """The same from memory."""
        with self._lock:
            copied, runs = self._pages(begin, end)
            for page, count in runs:
                at = page * PAGE - begin
                self._write(page, count, content[at : at + count * PAGE])
            for page in copied:
                at = page * PAGE
                self._copy(page, content[at - begin : at - begin + min(PAGE, end - at)], again)

    def lay(self, begin: int, end: int, content: memoryview) -> None:
        """Pages before the piece that has them. What is here stays as it is, and they do when the piece comes."""
        with self._lock:
            for page in range(begin // PAGE, (end - 1) // PAGE + 1):
                if page not in self._copied:
                    at = page * PAGE - begin
                    self._write(page, 1, content[at : at + PAGE])
                    self._copied[page] = 0

    def drop(self, begin: int, end: int) -> None:
        """Let go of them; nobody looks at them any more."""
        with self._lock:
            copied, runs = self._pages(begin, end)
            for page, count in runs:
                self._clear(page, count)
            for page in copied:
                self._copied[page] -= 1
                if self._copied[page] <= 0:
                    del self._copied[page]
                    self._clear(page, 1)

    def _pages(self, begin: int, end: int) -> tuple[list[int], list[tuple[int, int]]]:
        """The pages of a piece: those that are copied, and the runs (first, how many) of others between them."""
        first, last = begin // PAGE, (end - 1) // PAGE
        copied = sorted({first, last, *(page for page in self._copied if first < page < last)})
        runs = [(page + 1, following - page - 1) for page, following in pairwise(copied) if following > page + 1]
        return copied, runs

    def _copy(self, page: int, content: bytes | memoryview, again: bool) -> None:
        """A page that pieces may share. One that is here stays as it is: the digests of samples in it may have been
        compared already, and this piece's copy of it may be a bad one.
        """
        here = page in self._copied
        self._copied[page] += not (here and again)
        if again or not here:
            self._write(page, 1, content, anew=not here)

    def _write(self, page: int, count: int, content: bytes | memoryview, anew: bool = True) -> None:
        both = mmap.PROT_READ | mmap.PROT_WRITE
        if anew:
            self._place(page, count, both, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED)
        else:
            _libc.mprotect(self._address + page * PAGE, count * PAGE, both)
        source = np.frombuffer(content, np.uint8)
        ctypes.memmove(self._address + page * PAGE, source.ctypes.data, len(source))
        _libc.mprotect(self._address + page * PAGE, count * PAGE, mmap.PROT_READ)

    def _clear(self, page: int, count: int) -> None:
        self._place(page, count, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED | _NO_RESERVE)

    def _place(self, page: int, count: int, protection: int, flags: int, file: int = -1, offset: int = 0) -> None:
        at = self._address + page * PAGE
        if _libc.mmap(at, count * PAGE, protection, flags, file, offset) == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
