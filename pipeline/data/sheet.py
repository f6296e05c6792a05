"""Samples drawn: pictures as one picture, or pictures, sounds and text on one HTML page that needs nothing beside it.

What a sample says has been worked out before (preview.py); here it only gets its form. Small pictures are enlarged by
whole numbers, so that pixels stay visible. A sound is the outline of its samples, scaled to its own peak, which is
told; short ones can be played. The page follows the reader's choice of light or dark and loads nothing. What it gives
up: the parts of a sound that is longer than a page is wide, and playing files of 200 kB and more.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from pipeline import look
from pipeline.data.sound import Audio

TILE = 128  # pixels, side of one picture
WAVE = (240, 64)  # columns and height of a waveform
PLAYED_BYTES = 200_000  # a larger sound file is not put into the page
STYLE = """
header p { margin: 0; color: var(--soft); max-width: 72em; overflow-wrap: anywhere }
main { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 20px; align-items: flex-start }
figure { box-sizing: border-box; margin: 0; padding: 8px; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; display: flex; flex-direction: column; gap: 6px; max-width: 100% }
figure.wide { width: 300px }
figure.text { width: 560px }
figcaption { font-size: 12px; color: var(--soft); max-width: 34em; overflow-wrap: anywhere }
figure:not(.wide):not(.text) figcaption { max-width: 128px }
.tile { width: 128px; height: 128px; display: flex; align-items: center; justify-content: center }
figure p { margin: 0; font-size: 12px; color: var(--soft) }
svg { width: 100%; height: 64px; color: var(--wave); display: block }
audio { width: 100%; height: 36px }
pre { margin: 0; max-height: 17em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.45 ui-monospace, monospace }
"""


class Sound(NamedTuple):
    """A sound of a sample: what it is, and the file it came from."""

    audio: Audio
    extension: str
    data: bytes | memoryview


class Shown(NamedTuple):
    """One sample as it is shown."""

    title: str
    key: str
    pictures: Sequence[np.ndarray]  # uint8[height, width, 1, 3 or 4]
    sounds: Sequence[Sound]
    text: str  # "" if there is none


def draw(shown: Sequence[Shown]) -> Image.Image:
    """The first picture of every sample with its title below, in a grid that is about square."""
    columns = int(np.ceil(np.sqrt(len(shown))))
    rows = -(-len(shown) // columns)
    gap, caption = 8, 16
    sheet = Image.new("RGB", (columns * (TILE + gap) + gap, rows * (TILE + caption + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, sample in enumerate(shown):
        left, top = gap + i % columns * (TILE + gap), gap + i // columns * (TILE + caption + gap)
        pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill="#eeeeee")
        for pixels in sample.pictures[:1]:
            image = _thumbnail(pixels).convert("RGBA")
            sheet.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2), image)
        title = sample.title.encode("ascii", "replace").decode()
        pen.text((left, top + TILE + 2), title if len(title) <= 21 else title[:18] + "...", fill="black")
    return sheet


def page(title: str, facts: Sequence[str], shown: Sequence[Shown]) -> str:
    """One HTML page: what is known of the data set, then every sample."""
    lines = "".join(f"<p>{html.escape(fact)}</p>" for fact in facts)
    body = f"<header><h1>{html.escape(title)}</h1>{lines}</header><main>{''.join(map(_figure, shown))}</main>"
    return look.document(title, STYLE, body)


def sound_line(audio: Audio) -> str:
    """Length, rate, channels and peak of a sound, for people."""
    peak = float(np.abs(audio.samples).max(initial=0))
    return f"{len(audio.samples) / audio.rate:.2f} s at {sound_kind(audio)}, peak {peak:.3g}"


def sound_kind(audio: Audio) -> str:
    """Rate and channels."""
    channels = audio.samples.shape[1]
    return f"{audio.rate:,} Hz, {channels} channel{'' if channels == 1 else 's'}"


def _figure(sample: Shown) -> str:
    kind = "text" if len(sample.text) > 200 else "wide" if sample.sounds or sample.text else ""
    parts = [_picture(pixels, sample.title) for pixels in sample.pictures]
    parts += [_sound(sound, sample.title) for sound in sample.sounds]
    if sample.text:
        parts.append(f'<pre tabindex="0">{html.escape(sample.text)}</pre>')
    caption = f"<figcaption>{html.escape(sample.title)}</figcaption>"
    return f'<figure class="{kind}" title="{html.escape(sample.key)}">{"".join(parts)}{caption}</figure>'


def _picture(pixels: np.ndarray, title: str) -> str:
    buffer = io.BytesIO()
    _thumbnail(pixels).save(buffer, format="PNG")
    alt = html.escape(f"sample {title}, {pixels.shape[1]} by {pixels.shape[0]} pixels")
    return f'<div class="tile"><img alt="{alt}" src="{_inline("image/png", buffer.getvalue())}"></div>'


def _thumbnail(pixels: np.ndarray) -> Image.Image:
    """The picture with its longer side at most TILE; a small one enlarged by a whole number."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    scale = TILE / max(image.size)
    scale = int(scale) if scale >= 1 else scale
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _sound(sound: Sound, title: str) -> str:
    """A waveform, a line on it, and a player if the file is short."""
    line, size = sound_line(sound.audio), len(sound.data)
    label = html.escape(f"waveform of sample {title}: {line}")
    columns, height = WAVE
    image = (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {columns} {height}" preserveAspectRatio="none">'
        f'<path d="{_outline(sound.audio.samples)}" fill="currentColor" stroke="currentColor"'
        ' vector-effect="non-scaling-stroke"/></svg>'
    )
    if size >= PLAYED_BYTES:
        return f"{image}<p>{line}; {size:,} bytes, too many to play here</p>"
    source = _inline(f"audio/{sound.extension}", sound.data)
    return f'{image}<audio controls preload="metadata" aria-label="{label}" src="{source}"></audio><p>{line}</p>'


def _outline(samples: np.ndarray) -> str:
    """float32[frames, channels] -> an SVG path along the highest values, and back along the lowest, of each column."""
    columns, height = WAVE
    values = np.nan_to_num(samples, posinf=0, neginf=0)
    scale = np.abs(values).max(initial=0) or 1.0
    if not len(values):
        values = np.zeros((1, 1), np.float32)
    edges = np.linspace(0, len(values), min(columns, len(values)), endpoint=False).astype(int)
    x = np.linspace(0, columns, len(edges)).round().astype(int) if len(edges) > 1 else np.array([0, columns])
    highest, lowest = np.maximum.reduceat(values.max(1), edges), np.minimum.reduceat(values.min(1), edges)
    top, bottom = ((height / 2 * (1 - 0.95 * edge / scale)).round(1) for edge in (highest, lowest))
    forth, back = zip(x, np.resize(top, len(x))), zip(x[::-1], np.resize(bottom, len(x))[::-1])
    return "M" + "L".join(f"{column} {level:g}" for column, level in (*forth, *back)) + "Z"


def _inline(kind: str, data: bytes | memoryview) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
