"""The page of a report: sections of cards, notes, tables and charts as one HTML file without scripts.

It knows how things look and nothing of what they mean. All text is escaped here. Nothing is fetched: styles and charts
are inline, and the fonts are those of the reader's system.
"""

import html
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from experiments import report_draw
from experiments.report_charts import NUM_COLORS, Chart, Kind, Series

_STYLE = """
:root { color-scheme: light dark; --page: #f4f6f8; --card: #ffffff; --ink: #1b2430; --muted: #5b6673; --line: #d9dee4;
  --bad: #b3261e; --good: #1a6b3c; --c0: #1f6fb4; --c1: #c4590e; --c2: #1d8a52; --c3: #8a4fc0; --c4: #b8336a;
  --c5: #0f8a99; --c6: #8a6d00; --c7: #5a6472; }
@media (prefers-color-scheme: dark) { :root { --page: #12161b; --card: #1b2129; --ink: #e6eaef; --muted: #9aa6b2;
  --line: #333d48; --bad: #ff8a80; --good: #7ad6a0; --c0: #6cb2f0; --c1: #f0975a; --c2: #5fcf94; --c3: #bf95ec;
  --c4: #ee82ac; --c5: #4fcbd8; --c6: #d9bc4a; --c7: #a9b4c0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 16px; }
h1, h2, h3, p, dt, dd, li, caption, td:first-child, .text td { overflow-wrap: anywhere; } td { white-space: nowrap; }
td:first-child, .text td { white-space: normal; min-width: 7em; }
h1 { font-size: 1.6rem; margin: 8px 0; }
h2 { font-size: 1.25rem; margin: 36px 0 8px; border-bottom: 2px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 2px; }
summary { font-size: 1.25rem; font-weight: 700; margin: 28px 0 8px; cursor: pointer; overflow-wrap: anywhere; }
nav { font-size: 0.9rem; } nav a { color: var(--c0); margin-right: 14px; display: inline-block; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); gap: 14px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; margin: 0; }
.cards div, figure, .table { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.cards div { padding: 8px 12px; } .cards dt { color: var(--muted); font-size: 0.85rem; }
.cards dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.cards dd span { font-size: 0.85rem; font-weight: 400; }
.cards dd small { display: block; color: var(--muted); font-size: 0.8rem; font-weight: 400; }
.note { max-width: 75ch; margin: 8px 0; } .bad, .cards .bad { color: var(--bad); font-weight: 700; }
.good { color: var(--good); font-weight: 600; }
.badge { color: var(--bad); border: 1.5px solid var(--bad); border-radius: 5px; padding: 0 6px; font-size: 0.75rem;
  font-weight: 700; white-space: nowrap; vertical-align: middle; }
figure { margin: 0; padding: 12px; min-width: 0; display: flex; flex-direction: column; }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
figure p { margin: 6px 0 0; font-size: 0.85rem; color: var(--muted); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0; padding: 0;
  font-size: 0.85rem; }
.legend svg { display: inline-block; width: 26px; height: 10px; margin-right: 5px; vertical-align: middle; }
.table { padding: 4px 12px; margin: 10px 0; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child, .text td, .text th { text-align: left; } .text { table-layout: fixed; }
.text th:first-child { width: 38%; } tr:last-child td { border-bottom: 0; }
th { color: var(--muted); font-weight: 600; } caption { text-align: left; color: var(--muted); padding: 4px 8px; }
@media (max-width: 720px) { main { padding: 10px; } th, td { padding: 4px; }
  .stack thead { display: none; } .wide { width: 100%; }
  .stack tr { display: block; border-bottom: 2px solid var(--line); padding: 6px 0; }
  .stack td { display: flex; justify-content: space-between; gap: 12px; border: 0; padding: 1px 4px; }
  .stack td::before { content: attr(data-label); color: var(--muted); text-align: left; }
  .stack td:first-child { font-weight: 700; } }
@media (max-width: 430px) { table { font-size: 0.78rem; } .table { padding: 4px; } th, td { padding: 3px; }
  td:first-child { min-width: 6em; } }
"""

_MOST_COLUMNS = 5  # of a table that fits a narrow page


class Note(NamedTuple):
    """A sentence; an alarm is red, and good news is green."""

    text: str
    alarm: bool = False
    good: bool = False


class Card(NamedTuple):
    """A number that is looked at first.

    Attributes:
      label: what it is.
      value: the number.
      unit: of it.
      more: in small print.
      alarm: it should not be so.
    """

    label: str
    value: str
    unit: str = ""
    more: str = ""
    alarm: bool = False


class Table(NamedTuple):
    """A table.

    Attributes:
      caption: what it holds.
      columns: their heads.
      rows: cells, as many as there are columns.
      text: cells are text and no numbers, in two columns.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: bool = False


Block = Note | Card | Table | Chart


class Section(NamedTuple):
    """A part of the page.

    Attributes:
      title: its head.
      blocks: what it shows.
      synthetic: what it shows follows from acceptance that was drawn at random.
    """

    title: str
    blocks: tuple[Block, ...]
    synthetic: bool = False


class Chapter(NamedTuple):
    """Sections about one run, or about all of them.

    Attributes:
      title: its head; nothing is shown where there is a single chapter.
      sections: its parts.
    """

    title: str
    sections: tuple[Section, ...]


def page(title: str, chapters: Sequence[Chapter]) -> str:
    """Lay out the whole page. Further chapters than the first are folded.

    Raises:
      RunError: charts cannot be drawn.
    """
    report_draw.check_matplotlib()
    parts = ["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">']
    parts.append('<meta name="viewport" content="width=device-width, initial-scale=1">')
    parts.append(f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main>")
    parts.append(f"<h1>{_text(title)}</h1>")
    for number, chapter in enumerate(chapters):
        if number:
            parts.append(f"<details><summary>{_text(chapter.title)}</summary>")
        elif len(chapters) > 1:
            parts.append(f"<h2>{_text(chapter.title)}</h2>")
        parts += _chapter(chapter, f"r{number}")
        parts += ["</details>"] if number else []
    return "\n".join([*parts, "</main></body></html>", ""])


def _chapter(chapter: Chapter, prefix: str) -> Iterator[str]:
    links = [
        f'<a href="#{prefix}s{number}">{_text(section.title)}</a>' for number, section in enumerate(chapter.sections)
    ]
    yield f"<nav>{''.join(links)}</nav>"
    for number, section in enumerate(chapter.sections):
        anchor = f"{prefix}s{number}"
        badge = ' <span class="badge">SYNTHETIC ACCEPTANCE</span>' if section.synthetic else ""
        yield f'<section id="{anchor}"><h2>{_text(section.title)}{badge}</h2>'
        yield from _blocks(section.blocks, anchor)
        yield "</section>"


def _blocks(blocks: Sequence[Block], prefix: str) -> Iterator[str]:
    """Lay blocks out; neighbours that are charts or cards share a grid."""
    shown: type | None = None
    for number, block in enumerate(blocks):
        kind = type(block)
        if shown is not kind and shown in (Card, Chart):
            yield "</dl>" if shown is Card else "</div>"
        if shown is not kind and kind in (Card, Chart):
            yield '<dl class="cards">' if kind is Card else '<div class="grid">'
        yield _block(block, f"{prefix}c{number}-")
        shown = kind
    if shown in (Card, Chart):
        yield "</dl>" if shown is Card else "</div>"


def _block(block: Block, prefix: str) -> str:
    if isinstance(block, Note):
        look = " bad" if block.alarm else " good" if block.good else ""
        return f'<p class="note{look}">{_text(block.text)}</p>'
    if isinstance(block, Card):
        look = ' class="bad"' if block.alarm else ""
        more = f"<small>{_text(block.more)}</small>" if block.more else ""
        unit = f" <span>{_text(block.unit)}</span>" if block.unit else ""
        return f"<div><dt>{_text(block.label)}</dt><dd{look}>{_text(block.value)}{unit}{more}</dd></div>"
    if isinstance(block, Table):
        return _table(block)
    svg = report_draw.draw(block, prefix).replace("<svg", f'<svg role="img" aria-label="{_text(block.title)}"', 1)
    return f"<figure><h3>{_text(block.title)}</h3>{svg}{_legend(block)}<p>{_text(block.caption)}</p></figure>"


def _table(table: Table) -> str:
    """Lay a table out; where the page is narrow and columns are many, each row becomes a list."""
    is_wide = len(table.columns) > _MOST_COLUMNS
    look = " ".join(name for name, applies in (("text", table.text), ("stack", is_wide)) if applies)
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    rows = []
    for cells in table.rows:
        labelled = zip(table.columns, cells, strict=True)
        rows.append("".join(f'<td data-label="{_text(column)}">{_text(cell)}</td>' for column, cell in labelled))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    caption = f"<caption>{_text(table.caption)}</caption>"
    whole = f"{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="table{" wide" if is_wide else ""}"><table class="{look}">{whole}</table></div>'


def _legend(chart: Chart) -> str:
    """Say which curve is which, where there is more than one thing to see."""
    if len(chart.series) + len(chart.marks) < 2:
        return ""
    items = [f"<li>{_swatch(series)}{_text(series.label)}</li>" for series in chart.series]
    dashes = (
        '<svg viewBox="0 0 26 10"><path d="M0 5H26" stroke="var(--bad)" stroke-width="2" stroke-dasharray="5 3"/></svg>'
    )
    items += [f"<li>{dashes}{_text(mark.label)}</li>" for mark in chart.marks]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _swatch(series: Series) -> str:
    color = f"var(--c{series.color % NUM_COLORS})"
    if series.kind in (Kind.BARS, Kind.STACK):
        shape = f'<rect width="26" height="10" fill="{color}"/>'
    elif series.kind is Kind.DOTS:
        shape = f'<circle cx="13" cy="5" r="3" fill="{color}"/>'
    else:
        dashes = ' stroke-dasharray="5 3"' if series.color >= NUM_COLORS else ""
        shape = f'<path d="M0 5H26" stroke="{color}" stroke-width="2"{dashes}/>'
    return f'<svg viewBox="0 0 26 10">{shape}</svg>'


def _text(text: str) -> str:
    """Escape; the n of a caption stays with its number."""
    return html.escape(text).replace("n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
