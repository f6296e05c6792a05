"""Unpacked Debian packages -> tables that `millstream data pack` reads; launch/example-data calls it.

    python launch/example_tables.py speech FOLDER OUT.csv

speech  FOLDER/<language>_<country>_<speaker>/<prompt>.wav -> key, file, language, prompt. Silence is left out, and
        what has no samples.
stamps  FOLDER/<class>/.../<name>.png with the English caption in the first line of <name>.txt -> key, file, class,
        caption. Each picture is scaled to SIDE x SIDE beside OUT, in the middle of a white square.
"""

from __future__ import annotations

import csv
import re
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

SIDE = 64  # pixels


def speech(folder: Path) -> Iterator[dict[str, str]]:
    """Rows of the clips of all languages."""
    for path in sorted(folder.rglob("*.wav")):
        speaker, *parts = path.relative_to(folder).with_suffix("").parts
        with wave.open(str(path)) as clip:
            empty = clip.getnframes() == 0
        if not empty and "silence" not in parts:
            language, prompt = speaker.partition("_")[0], "/".join(parts)
            yield {"key": f"{language}/{prompt}", "file": str(path.absolute()), "language": language, "prompt": prompt}


def stamps(folder: Path, scaled: Path) -> Iterator[dict[str, str]]:
    """Rows of the pictures that have a caption; writes them into `scaled`."""
    for path in sorted(folder.rglob("*.png")):
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").partition("\n")[0].strip() if text.is_file() else ""
        if not caption:
            continue
        parts = path.relative_to(folder).with_suffix("").parts
        key = "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in parts)
        out = scaled / f"{key}.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        on_white(path).save(out)
        yield {"key": key, "file": str(out.absolute()), "class": parts[0], "caption": caption}


def on_white(path: Path) -> Image.Image:
    """A picture of any mode and shape as RGB, SIDE x SIDE, whole, in the middle."""
    with Image.open(path) as image:
        picture = image.convert("RGBA")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3)
    square = Image.new("RGBA", (SIDE, SIDE), "white")
    square.alpha_composite(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return square.convert("RGB")


def main() -> int:
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    rows = list(speech(folder) if name == "speech" else stamps(folder, out.parent / "scaled"))
    if not rows:
        print(f"example_tables: {folder} holds no {name}; has the package changed?", file=sys.stderr)
        return 78
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
