"""Drawing charts as SVG for a page that may be light or dark. The only file of the report that needs matplotlib.

An SVG holds axes and curves; colours are variables of the page's style sheet. The same chart gives the same bytes.
"""

import io
import re
from typing import Any

from experiments import common
from experiments.report_charts import NUM_COLORS, Axis, Chart, Kind, Series

try:
    import matplotlib as mpl
    from matplotlib import figure, ticker
    from matplotlib.backends import backend_svg
except ImportError:  # an optional dependency: only reports and plots need it
    mpl = figure = ticker = backend_svg = None

_SIZE_IN = (4.8, 2.9)  # about the width of a card, so that text is drawn in about its own size
# Colours that stand for the style sheet's variables until the SVG is made.
_SERIES = tuple(f"#0100{index:02x}" for index in range(NUM_COLORS))
_INK, _MUTED, _GRID, _MARK = "#020000", "#020001", "#020002", "#020003"
_VARIABLES = {color: f"var(--c{index})" for index, color in enumerate(_SERIES)}
_VARIABLES |= {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--line)", _MARK: "var(--bad)"}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "report",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
}


def check_matplotlib() -> None:
    """See whether anything can be drawn.

    Raises:
      RunError: matplotlib is not installed.
    """
    if mpl is None:
        raise common.RunError("a report needs matplotlib: install the extra `plots`, as in pip install -e '.[plots]'")


def draw(chart: Chart, prefix: str) -> str:
    """Draw a chart.

    Args:
      chart: what to draw.
      prefix: of the names inside, so that no two charts of a page share one.

    Returns:
      An `<svg>` element that takes the width it is given.
    """
    assert any(len(series.x) for series in chart.series), f"{chart.title}: nothing to draw"
    for axis in (chart.x, chart.y, *(() if chart.right is None else (chart.right,))):
        assert re.search(r"\([^()]+\)$", axis.label), f"{chart.title}: the axis {axis.label!r} has no unit"
    assert mpl is not None  # as `check_matplotlib` has seen
    assert figure is not None
    assert backend_svg is not None
    with mpl.rc_context(_STYLE):
        picture = figure.Figure(figsize=_SIZE_IN, layout="constrained")
        backend_svg.FigureCanvasSVG(picture)
        _fill(picture.add_subplot(), chart)
        text = io.StringIO()
        picture.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _embeddable(text.getvalue(), prefix)


def _fill(axes: Any, chart: Chart) -> None:
    """Draw axes, curves and limits."""
    right = None if chart.right is None else axes.twinx()
    below: Any = 0.0
    for series in chart.series:
        _draw_series(right if series.right else axes, series, below)
        below = below + series.y if series.kind is Kind.STACK else below
    for mark in chart.marks:
        (axes.axvline if mark.vertical else axes.axhline)(mark.value, color=_MARK, linestyle="--", linewidth=1.2)
    _set_axis(axes, "x", chart.x)
    _set_axis(axes, "y", chart.y)
    if right is None:
        axes.spines["right"].set_visible(False)
    else:
        assert chart.right is not None, "there is one only for it"
        right.grid(visible=False)
        _set_axis(right, "y", chart.right)


def _draw_series(axes: Any, series: Series, below: Any) -> None:
    """Draw a curve; stacked bars begin `below` each."""
    style = {"color": _SERIES[series.color % NUM_COLORS]}
    if series.kind in (Kind.BARS, Kind.STACK):
        axes.bar(series.x, series.y, series.width, bottom=below if series.kind is Kind.STACK else 0.0, **style)
    elif series.kind is Kind.DOTS:
        axes.plot(series.x, series.y, ".", markersize=5, alpha=0.6, markeredgewidth=0, clip_on=False, **style)
    else:
        drawn = {Kind.STEP: {"drawstyle": "steps-post"}, Kind.JOINED: {"marker": ".", "markersize": 7}}
        dashes = "--" if series.color >= NUM_COLORS else "-"
        axes.plot(series.x, series.y, dashes, linewidth=1.4, **drawn.get(series.kind, {}), **style)


def _set_axis(axes: Any, name: str, axis: Axis) -> None:
    """Label an axis, and number it in plain digits."""
    assert ticker is not None
    place = getattr(axes, f"{name}axis")
    if axis.log:
        axes.set(**{f"{name}scale": "log"})
        place.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        place.set_minor_formatter(ticker.NullFormatter())
    else:
        place.set_major_locator(ticker.MaxNLocator(nbins=10 if axis.whole else 6, integer=axis.whole))
    place.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.6g}"))
    if axis.low is not None or axis.high is not None:
        fitted = max(getattr(axes, f"get_{name}lim")()[1], 1.05 * getattr(axes.dataLim, f"{name}max"))
        axes.set(**{f"{name}lim": (axis.low, fitted if axis.high is None else axis.high)})
    axes.set(**{f"{name}label": axis.label})


def _embeddable(svg: str, prefix: str) -> str:
    """Make a file a part of a page: no header, no size, no foreign names, no needless digits, colours of the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]+"', body)
    assert view is not None, "matplotlib writes one"
    body = re.sub(r"<svg[^>]*>", f"<svg {view[0]}>", body, count=1)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", body)
    body = re.sub(r"#0[12]00[0-9a-f]{2}", lambda found: _VARIABLES[found[0]], body)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "'DejaVu Sans', Verdana, sans-serif", body)
    body = re.sub(r"<[^>]+>", lambda tag: _short(tag[0]), body)
    return re.sub(r">\s+<", "><", body).strip()


def _short(tag: str) -> str:
    """Round the numbers of a tag to hundredths of a point, and leave out turns by nothing."""
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)
    return re.sub(r"\s+", " ", tag)
