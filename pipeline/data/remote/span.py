"""Memory that stands for a file of which only some pieces are here, each mapped from a file of its own.

A tar of a remote data set is one range of addresses, so whoever reads it need not know that it is in pieces. What is
not here reads as zeros, which no digest agrees with. Pieces are whole pages and may share the page at which they meet:
such pages are copied, all others are mapped from the piece's file, whose bytes stay for as long as they are mapped,
even when the file is removed. Linux and macOS; mmap(2) says how one mapping replaces another (MAP_FIXED).

What it gives up: it does not know who looks at a piece that is let go of; the caller does.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import Counter

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
        self._edges: Counter[int] = Counter()  # pages that are copied -> pieces that have them
        self._lock = threading.Lock()

    def map(self, begin: int, end: int, file: int, again: bool = False) -> None:
        """Bytes `begin` to `end`, from page to page or to the end of all, from an open file that holds just them.

        again: in place of bytes that are here and are wrong.
        """
        first, last, inner = self._pages(begin, end)
        with self._lock:
            if inner > 0:
                self._place(first + 1, inner, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, file, PAGE)
            for page in {first, last}:
                at = page * PAGE
                self._copy(page, os.pread(file, min(PAGE, end - at), at - begin), again)

    def fill(self, begin: int, end: int, content: memoryview, again: bool = False) -> None:
        """The same from memory."""
        first, last, inner = self._pages(begin, end)
        with self._lock:
            if inner > 0:
                self._write(first + 1, inner, content[PAGE : PAGE + inner * PAGE])
            for page in {first, last}:
                at = page * PAGE
                self._copy(page, content[at - begin : at - begin + min(PAGE, end - at)], again)

    def drop(self, begin: int, end: int) -> None:
        """Let go of them; nobody looks at them any more."""
        first, last, inner = self._pages(begin, end)
        with self._lock:
            if inner > 0:
                self._clear(first + 1, inner)
            for page in {first, last}:
                self._edges[page] -= 1
                if self._edges[page] <= 0:
                    del self._edges[page]
                    self._clear(page, 1)

    def _pages(self, begin: int, end: int) -> tuple[int, int, int]:
        """First page, last page, and how many lie between them."""
        first, last = begin // PAGE, (end - 1) // PAGE
        return first, last, last - first - 1

    def _copy(self, page: int, content: bytes | memoryview, again: bool) -> None:
        """A page that pieces may share. One that is here stays as it is: the digests of samples in it may have been
        compared already, and this piece's copy of it may be a bad one.
        """
        here = self._edges[page] > 0
        self._edges[page] += not (here and again)
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
