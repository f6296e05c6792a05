"""Pieces that share a page: none takes from another what was already looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.data.remote.span import PAGE, Span

SIZE = 5 * PAGE
GOOD, BAD = bytes(range(256)) * (SIZE // 256), b"\xee" * SIZE


@pytest.fixture(params=["map", "fill"])
def put(request: pytest.FixtureRequest, tmp_path: Path):
    """Put bytes of a content into a span, from a file or from memory."""

    def put(span: Span, content: bytes, begin: int, end: int, again: bool = False) -> None:
        if request.param == "fill":
            span.fill(begin, end, memoryview(content)[begin:end], again)
            return
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        path.write_bytes(content[begin:end])
        file = os.open(path, os.O_RDONLY)
        try:
            span.map(begin, end, file, again)
        finally:
            os.close(file)

    return put


def test_a_bad_neighbour_does_not_change_a_page_that_is_here(put) -> None:
    """The digests of samples in it may have been compared already."""
    span = Span(SIZE)
    put(span, GOOD, 0, 3 * PAGE)
    put(span, BAD, 2 * PAGE, SIZE)
    assert bytes(span.view[: 3 * PAGE]) == GOOD[: 3 * PAGE] and bytes(span.view[3 * PAGE :]) == BAD[3 * PAGE :]


def test_what_is_wrong_is_replaced_and_let_go_of_once(put) -> None:
    span = Span(SIZE)
    put(span, BAD, 0, 3 * PAGE)
    put(span, GOOD, 2 * PAGE, SIZE)
    put(span, GOOD, 0, 3 * PAGE, again=True)
    assert bytes(span.view) == GOOD
    span.drop(0, 3 * PAGE)
    assert bytes(span.view[: 2 * PAGE]) == bytes(2 * PAGE) and bytes(span.view[2 * PAGE :]) == GOOD[2 * PAGE :]
    span.drop(2 * PAGE, SIZE)
    assert bytes(span.view) == bytes(SIZE)


def test_what_came_before_its_piece_stays_and_goes_with_it(put) -> None:
    span = Span(SIZE)
    span.lay(PAGE, 3 * PAGE, memoryview(GOOD)[PAGE : 3 * PAGE])
    assert bytes(span.view) == bytes(PAGE) + GOOD[PAGE : 3 * PAGE] + bytes(2 * PAGE)
    put(span, BAD, 0, SIZE)
    assert bytes(span.view) == BAD[:PAGE] + GOOD[PAGE : 3 * PAGE] + BAD[3 * PAGE :]
    put(span, GOOD, 0, SIZE, again=True)
    assert bytes(span.view) == GOOD
    span.drop(0, SIZE)
    assert bytes(span.view) == bytes(SIZE)


def test_what_comes_before_its_piece_leaves_a_neighbour_as_it_is(put) -> None:
    span = Span(SIZE)
    put(span, GOOD, 0, 2 * PAGE)
    span.lay(PAGE, 3 * PAGE, memoryview(BAD)[PAGE : 3 * PAGE])
    assert bytes(span.view) == GOOD[: 2 * PAGE] + BAD[2 * PAGE : 3 * PAGE] + bytes(2 * PAGE)
    put(span, GOOD, PAGE, SIZE)
    span.drop(0, 2 * PAGE)
    assert bytes(span.view) == bytes(PAGE) + GOOD[PAGE : 2 * PAGE] + BAD[2 * PAGE : 3 * PAGE] + GOOD[3 * PAGE :]
    span.drop(PAGE, SIZE)
    assert bytes(span.view) == bytes(SIZE)
