"""One HTML file with thumbnails inside: no scripts, nothing from elsewhere, for light and dark screens."""

import base64
import dataclasses
import html
from collections.abc import Sequence

from experiments.gallery.thumbnails import Thumbnail, jpeg

_SMALL = 96  # px of the longer side, below which an image is enlarged pixel by pixel
_MOST_LINKS = 60
_FEW = 3  # cards, with which sections stand side by side

# The policy keeps a browser from loading anything, even if a name were not escaped.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --muted: #66707c; --line: #dfe3e8; --page: #f5f6f8; --card: #fff;
  --accent: #2f6db5; --tile: #eceff2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --muted: #98a2ae; --line: #31373f; --page: #15181c; --card: #1e2227; --accent: #79aeea;
    --tile: #14171a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 28px 24px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0; overflow-wrap: anywhere; }
.about, .note { color: var(--muted); margin: 0 0 4px; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 8px; margin: 16px 0 0; }
nav a { color: var(--accent); text-decoration: none; border: 1px solid var(--line); border-radius: 999px;
  padding: 2px 12px; background: var(--card); font-size: 13.5px; }
nav a:hover, nav a:focus-visible { border-color: var(--accent); }
main { display: flex; flex-wrap: wrap; column-gap: 28px; }
section { flex: 1 1 100%; margin-top: 30px; padding-top: 18px; border-top: 1px solid var(--line);
  scroll-margin-top: 8px; }
section.few { flex: 0 1 auto; width: calc(var(--cards) * 180px); max-width: 100%; }
ul { list-style: none; display: grid; grid-template-columns: repeat(auto-fill, minmax(152px, 1fr)); gap: 14px;
  padding: 0; margin: 12px 0 0; }
li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
li.marked { border-color: var(--accent); box-shadow: 0 0 0 1px var(--accent); }
.tile { aspect-ratio: 1; background: var(--tile); display: flex; align-items: center; justify-content: center; }
.tile img { width: 100%; height: 100%; object-fit: contain; display: block; }
.tile img.small { image-rendering: pixelated; }
.tile span { color: var(--muted); font-size: 13px; }
.text { padding: 7px 10px 9px; font-size: 13px; }
.text b { display: block; font-size: 14px; font-variant-numeric: tabular-nums; }
li.marked .text b { color: var(--accent); }
.text span { display: block; color: var(--muted); overflow-wrap: anywhere; }
.text .name { color: var(--ink); }
@media print { li, section { break-inside: avoid; } }
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """An image with its text.

    Attributes:
        thumbnail: pixels; None where the image cannot be shown.
        heading: what is to be read first, such as a similarity.
        name: of the file, in full.
        lines: further text, one line each.
        marked: whether the card is framed.
    """

    thumbnail: Thumbnail | None
    heading: str
    name: str
    lines: Sequence[str] = ()
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """Cards under a heading; `link` is its short name in the list of links at the top."""

    heading: str
    link: str
    cards: Sequence[Card]
    note: str = ""


def render_page(title: str, about: Sequence[str], sections: Sequence[Section]) -> str:
    """The HTML of a page; all text is escaped.

    Args:
        title: of the page.
        about: lines below the title.
        sections: in order. If there are several, the page begins with links to the first 60 of them.
    """
    links = "".join(
        f'<a href="#s{number}">{_text(section.link)}</a>' for number, section in enumerate(sections[:_MOST_LINKS])
    )
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{_text(title)}</h1>",
        *(f'<p class="about">{_text(line)}</p>' for line in about),
        f"<nav>{links}</nav>" if len(sections) > 1 else "",
        "</header>\n<main>",
        *(_section(number, section) for number, section in enumerate(sections)),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(number: int, section: Section) -> str:
    note = f'<p class="note">{_text(section.note)}</p>\n' if section.note else ""
    cards = "\n".join(map(_card, section.cards))
    few = f' class="few" style="--cards: {len(section.cards)}"' if 0 < len(section.cards) <= _FEW else ""
    return f'<section id="s{number}"{few}>\n<h2>{_text(section.heading)}</h2>\n{note}<ul>\n{cards}\n</ul>\n</section>'


def _card(card: Card) -> str:
    name = _text(card.name)
    if card.thumbnail is None:
        picture = "<span>no image</span>"
    else:
        height, width = card.thumbnail.shape[:2]
        small = ' class="small"' if max(height, width) < _SMALL else ""
        data = base64.b64encode(jpeg(card.thumbnail)).decode()
        picture = f'<img{small} width="{width}" height="{height}" alt="{name}" src="data:image/jpeg;base64,{data}">'
    lines = "".join(f"<span>{_text(line)}</span>" for line in card.lines)
    return (
        f'<li{" class=marked" if card.marked else ""}><div class="tile">{picture}</div><div class="text">'
        f'<b>{_text(card.heading)}</b><span class="name">{_breakable(name)}</span>{lines}</div></li>'
    )


def _breakable(name: str) -> str:
    """An escaped path that may be broken after its folders and words."""
    return name.replace("/", "/<wbr>").replace("_", "_<wbr>")


def _text(text: str) -> str:
    """Escaped for text and attributes; letters that UTF-8 cannot hold become escapes, and control characters go."""
    printable = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return html.escape("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in printable))
