"""How every page looks that is written for people: one set of colours, in light and dark, one typeface, one frame.

A page is a single HTML file that loads nothing. Which of the two it is follows the reader's system. Text has a contrast
of 4.5 or more to what lies behind it, lines and marks of charts 3 or more (WCAG 2.2, 1.4.3 and 1.4.11).
"""

from __future__ import annotations

import html

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --line: #d8d8d4; --ink: #1c1c1a; --soft: #5d5d58;
  --wave: #2563a8 }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #21211f; --line: #3b3b37; --ink: #ececea;
  --soft: #a3a39c; --wave: #7db4f0 } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; padding: 24px; background: var(--page); color: var(--ink) }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere }
"""


def document(title: str, style: str, body: str, head: str = "") -> str:
    """The whole HTML file. `style`, `body` and `head` are trusted, `title` is not."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{head}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head><body>{body}</body></html>\n"
    )
