"""What a segment says of its rows: fields, columns, values, keys; for rows that are alike and rows that are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data import segment
from pipeline.data.segment import Segment, scan_tar
from tests.small_tars import Members, grouped, write_tar

ALIKE = [(f"{i}.{field}", b"%d" % i) for i in range(7) for field in ("jpg", "cls", "seg.png")]
RAGGED = [("a.txt", b"a"), ("b.cls", b"1"), ("b.txt", b""), ("c.txt", b"c"), ("a.cls", b"2"), ("d.seg.png", b"d")]
ONE_ORDER_LESS = [("a.x", b"1"), ("a.y", b"2"), ("b.y", b"3"), ("b.x", b"4")]  # the same fields, in another order


def scanned(tmp_path: Path, members: Members) -> Segment:
    content, samples, _ = scan_tar(write_tar(tmp_path / "a.tar", members))
    found = segment.open_segment(memoryview(content), segment.digest(content), "a", "")
    assert found.samples == samples
    return found


@pytest.mark.parametrize("members", [ALIKE, RAGGED, ONE_ORDER_LESS])
def test_samples_and_columns_tell_the_same(tmp_path: Path, members: Members):
    found = scanned(tmp_path, members)
    tar, expected = (tmp_path / "a.tar").read_bytes(), grouped(members)
    assert [found.key(row) for row in range(found.samples)] == list(expected)
    for row, fields in enumerate(expected.values()):
        sample = found.sample(row)
        assert {name: tar[place.offset : place.offset + place.length] for name, place in sample.items()} == fields
        assert list(sample) == list(fields)
        for name in (*found.names, "nowhere"):
            record = found.column(name)[row]
            assert (record >= 0) == (name in fields)
            if record >= 0:
                assert tuple(found.table[record].item()[:3]) == sample[name]
                assert found.member(int(record)) == f"{found.key(row)}.{name}"
    column = found.column(found.names[0])
    assert column is found.column(found.names[0]) and column.dtype == np.int64 and not column.flags.writeable


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ([b"1", b"-2", b"03\n"], [1, -2, 3]),
        ([b"9223372036854775807", b"-9223372036854775808"], [2**63 - 1, -(2**63)]),
        ([b"1", b"9223372036854775808"], None),
        ([b"1", b""], None),
        ([b"1", b"1.5"], None),
        ([b"1", b"cat"], None),
        ([b"1", b"0" * 30], None),
        ([b"1", "٣".encode()], None),
    ],
)
def test_classes_are_kept_by_value(tmp_path: Path, contents: list[bytes], expected: list[int] | None):
    members = [(f"{i}.{field}", data) for i, data in enumerate(contents) for field in ("cls", "b.cls", "txt")]
    found = scanned(tmp_path, members)
    for field in ("cls", "b.cls"):
        values = found.values(field)
        assert (None if values is None else values.tolist()) == expected
    assert found.values("txt") is None and found.values("nowhere") is None


def test_a_class_that_a_row_lacks_is_not_kept_by_value(tmp_path: Path):
    assert scanned(tmp_path, RAGGED).values("cls") is None


def test_a_shard_without_samples(tmp_path: Path):
    found = scanned(tmp_path, [])
    assert found.samples == 0 and found.table.size == found.column("cls").size == 0 and found.names == ()
