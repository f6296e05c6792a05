"""The fast way of image classification, a micro batch at once, against the slow one, sample by sample."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import index
from pipeline.data.reader import open_dataset
from pipeline.data.samples import Lookup, Samples
from tests.small_tars import write_tar
from tests.tasks.test_image_classification import task_of


@pytest.mark.parametrize("channels", [1, 3])
def test_gather_is_prepare_for_jpegs_of_the_right_size(tmp_path: Path, channels: int) -> None:
    rng, task = np.random.default_rng(6), task_of(channels=channels)

    def picture(format: str, height: int = 12, channels: int = channels) -> bytes:
        pixels, file = rng.integers(0, 256, (height, 12, channels), dtype=np.uint8), io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(file, format)
        return file.getvalue()

    plain = [{"jpg": picture("jpeg"), "cls": b"%d" % (number % 4)} for number in range(9)]
    odd = {
        "too high": {"jpg": picture("jpeg", height=13), "cls": b"1"},
        "other colours": {"jpg": picture("jpeg", channels=4 - channels), "cls": b"1"},
        "png": {"png": picture("png"), "cls": b"1"},
        "png called jpg": {"jpg": picture("png"), "cls": b"1"},
        "damaged": {"jpg": plain[0]["jpg"][:-40], "cls": b"1"},
        "label too high": {"jpg": plain[0]["jpg"], "cls": b"4"},
        "label too low": {"jpg": plain[0]["jpg"], "cls": b"-1"},
    }
    members = [(f"{n}.{name}", data) for n, row in enumerate([*plain, *odd.values()]) for name, data in row.items()]
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", [("unlabelled.jpg", plain[0]["jpg"])])
    index.build(tmp_path)
    buffers: dict[str, np.ndarray] = {}

    def empty(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return buffers.setdefault(name, np.full(shape, 99, dtype))

    with open_dataset(tmp_path) as dataset:

        def samples(*numbers: int) -> Samples:
            return Samples(Lookup([dataset], np.zeros(len(numbers), np.int64), np.array(numbers)), empty=empty)

        wanted = samples(*range(len(plain)))
        batch = task.gather(wanted)
        assert batch is not None and batch.keys() == {"image", "label"}
        for name, array in batch.items():
            expected = np.stack([task.prepare(row, None)[name] for row in wanted])
            assert array is buffers.pop(name) and array.dtype == expected.dtype
            assert np.array_equal(array, expected)
        for number, what in enumerate([*odd, "no label"], len(plain)):
            assert task.gather(samples(0, 1, 2, number, 3)) is None, what
            buffers.clear()
        assert task_of(channels=channels, center_crop=0.9).gather(samples(0, 1)) is None  # it is cut, and enlarged
