"""The numbers of a data set as tables for people; stats.py counts them.

Every table has the same columns for a spread (least, median, mean, most), aligned to the right, so that the eye can go
down a column. What it gives up: of many classes only the largest and the smallest are listed; `--json` has all.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.data.stats import Content, Spread, Stats

SPREAD = ["min", "median", "mean", "max"]
LISTED, LARGEST, SMALLEST = 16, 8, 4  # classes: all of them up to so many, else some of each end
KINDS = 4  # of one field
BAR = 24  # characters
BLOCKS = " ▏▎▍▌▋▊▉█"


class Section(NamedTuple):
    """A title, notes under it, and a table (none without columns). Cells are padded; all rows have all columns."""

    title: str
    notes: list[str]
    columns: list[str]
    rows: list[list[str]]


def page(stats: Stats) -> list[Section]:
    """All sections, in the order in which a person asks."""
    return [
        _head(stats),
        _shards(stats),
        _fields(stats),
        *(_classes(stats, name, counts) for name, counts in stats.classes.items()),
        *(_content(stats, content) for content in stats.contents),
    ]


def _head(stats: Stats) -> Section:
    facts = f"{stats.samples:,} samples in {stats.shards:,} shards, {size(stats.bytes)}, identity {stats.identity[:12]}"
    return Section(stats.folder, [facts], [], [])


def _shards(stats: Stats) -> Section:
    samples, size_ = stats.shard_samples, stats.shard_bytes
    rows = [["samples", *map(number, _spread(samples))], ["bytes", *map(size, _spread(size_))]]
    uneven = size_.max / size_.mean - 1 if size_.mean else 0
    notes = [f"the largest shard is {uneven:.0%} larger than the mean"] if stats.shards > 1 else []
    return _section("shards", notes, ["", *SPREAD], rows)


def _fields(stats: Stats) -> Section:
    rows, notes = [], []
    for field in stats.fields:
        missing = f"{field.missing:,}" if field.missing else "-"
        sizes = map(size, _spread(field.bytes))
        rows.append([field.name, f"{field.bytes.count:,}", missing, size(field.bytes.total), *sizes])
        if field.missing:
            share = field.missing / stats.counted
            notes.append(f"{field.name} is missing in {share:.2%} of the samples; {field.lacking} is the first of them")
    return _section(f"fields{_part(stats.counted, stats)}", notes, ["", "samples", "missing", "total", *SPREAD], rows)


def _classes(stats: Stats, name: str, counts: dict[int, int]) -> Section:
    total, most = sum(counts.values()), max(counts.values())
    ranked = sorted(counts, key=lambda label: (-counts[label], label))
    least = counts[ranked[-1]]
    listed: list[int | None] = [*sorted(counts)]
    notes = [f"{len(counts):,} classes; the largest has {most / least:,.2f} times the samples of the smallest"]
    if len(ranked) > LISTED:
        listed = [*ranked[:LARGEST], None, *ranked[-SMALLEST:]]
    absent = [label for label in range(min(max(counts), 10**6)) if label not in counts]
    if absent:
        examples = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        notes.append(f"no sample has {len(absent):,} of the classes below {max(counts):,}: {examples}")
    if min(counts) < 0:
        notes.append(f"classes begin at {min(counts)}; tasks want them from 0")
    rows = []
    for label in listed:
        if label is None:
            rows.append(["...", "", "", ""])
            continue
        named = stats.class_names[label] if 0 <= label < len(stats.class_names) else ""
        shown = f"{label} {named}" if named and named != str(label) else str(label)
        rows.append([shown, f"{counts[label]:,}", f"{counts[label] / total:.2%}", bar(counts[label] / most)])
    return _section(f"classes ({name}){_part(total, stats)}", notes, ["", "samples", "share", "\0"], rows)


def _content(stats: Stats, content: Content) -> Section:
    kinds = [f"{count:,} x {kind}" for kind, count in list(content.kinds.items())[:KINDS]]
    more = len(content.kinds) - KINDS
    notes = [", ".join(kinds) + (f" and {more} kinds more" if more > 0 else "")] if kinds else []
    if content.unreadable:
        notes.append(f"{content.unreadable:,} cannot be read, the first because: {content.why}")
    rows = [[measure, *map(number, _spread(spread))] for measure, spread in content.measures.items()]
    return _section(f"contents of {content.name}{_part(content.looked, stats)}", notes, ["", *SPREAD], rows)


def _part(counted: int, stats: Stats) -> str:
    """Said of a section that is not about all samples."""
    return "" if counted == stats.samples else f", over {counted:,} samples"


def _spread(spread: Spread) -> tuple[float, float, float, float]:
    return spread.min, spread.median, spread.mean, spread.max


def _section(title: str, notes: list[str], columns: list[str], rows: list[list[str]]) -> Section:
    """Pad the cells: the first column to the left, a column of bars too, all others to the right."""
    if not rows:
        return Section(title, notes, [], [])
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]

    def pad(line: list[str]) -> list[str]:
        return [
            cell.rjust(width) if i and columns[i] != "\0" else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ]

    return Section(title, notes, [cell.replace("\0", " ") for cell in pad(columns)], [pad(row) for row in rows])


def number(value: float) -> str:
    """With thousands set apart; parts only where they matter."""
    return (
        f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"
    )


def size(count: float) -> str:
    """Bytes for people: kB, MB, GB, TB are powers of 1,000."""
    power = 0
    while count >= 999.5 and power < 4:
        count, power = count / 1000, power + 1
    return f"{count:,.{1 if power else 0}f} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


def bar(share: float) -> str:
    """A bar of up to BAR characters, in eighths."""
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + BLOCKS[eighths % 8].strip()
