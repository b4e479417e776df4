"""Figures drawn by matplotlib, as SVG that is light or dark as its reader's system is.

matplotlib is imported by the first chart, so that no command waits for it which draws none.
"""

from __future__ import annotations

import base64
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import escape, unescape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 360, 236
HEAD = 38  # room for the title and the legend
STEP = 150  # from one name of the legend to the next
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 42  # room around the axes
NUM_COLOURS = 8
# matplotlib draws with placeholders, #000010 to #000019, which become variables of theme.css.
VARIABLES = (*(f"c{number}" for number in range(NUM_COLOURS)), "quiet", "rule")
QUIET, RULE = "#000018", "#000019"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a user's name may have a $
    "font.size": 11,
    "axes.axisbelow": True,
    "axes.edgecolor": QUIET,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0.03,
    "grid.color": RULE,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "xtick.major.pad": 5,
    "xtick.major.size": 0,
    "ytick.major.pad": 5,
    "ytick.major.size": 0,
}
NOTE = re.compile(r'<g id="note:([^"]+)">')
CLEANED = (
    (r'<g id="[^"]*"', "<g"),  # a page has many charts, and an id only once
    (r' clip-path="[^"]*"', ""),  # nothing leaves the axes
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r"font-[^;]*; ", ""),  # theme.css has the font
)
# matplotlib's settings are those of the process, so only one thread draws.
ONE_AT_A_TIME = threading.Lock()


class Key(NamedTuple):
    """What a colour (and a dash) stands for."""

    name: str
    colour: int
    dashed: bool = False


class Chart(NamedTuple):
    """SVG elements in a view box of `WIDTH` x `height`; `alt` has the content as text."""

    title: str
    alt: str
    height: float
    elements: str
    keys: tuple[Key, ...]


@contextmanager
def styled_axes(height: float = HEIGHT, left: float = LEFT) -> Iterator[tuple[Figure, Axes]]:
    """A figure of `WIDTH` x `height` with axes that begin at `left`, in the style of all charts."""
    from matplotlib import figure, style

    with ONE_AT_A_TIME, style.context(["default", STYLE]):
        drawn = figure.Figure(figsize=(WIDTH / 72, height / 72))
        inner = ((WIDTH - left - RIGHT) / WIDTH, (height - TOP - BOTTOM) / height)
        axes = drawn.add_axes((left / WIDTH, BOTTOM / height, *inner))
        axes.patch.set_visible(False)
        yield drawn, axes


def mark(axes: Axes, x: float, y: float, *, colour: str, radius: float, note: str) -> None:
    """Draw a dot, with a note for who points at it."""
    # A line of no length with round ends: matplotlib's own markers are definitions with ids.
    axes.plot([x, x], [y, y], color=colour, linewidth=2 * radius, zorder=3, gid=f"note:{note}")


def chart_of(figure: Figure, title: str, keys: Iterable[Key] = ()) -> Chart:
    """The figure as SVG; an artist whose gid is `note:...` has this note."""
    file = StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts have it
        figure.savefig(file, format="svg")
    svg = file.getvalue()
    # Without the file's head and the figure's background.
    svg = svg[svg.index('<g id="axes_1">') : svg.rindex("</g>")]
    notes = "; ".join(map(unescape, NOTE.findall(svg)))
    svg = NOTE.sub(r"<g><title>\1</title>", svg)
    for pattern, replacement in CLEANED:
        svg = re.sub(pattern, replacement, svg)
    for number, name in enumerate(VARIABLES):
        svg = svg.replace(f": #00001{number}", f": var(--{name})")
    height = figure.get_figheight() * 72
    return Chart(title, f"{title}. {notes}", round(height), svg, tuple(dict.fromkeys(keys)))


def colour_of(number: int) -> str:
    """The colour of a run or a part, as matplotlib takes it."""
    return f"#00001{number % NUM_COLOURS}"


def theme() -> str:
    """CSS: the colours, light and dark, and the font of charts."""
    return Path(__file__).with_name("theme.css").read_text(encoding="utf-8")


def svg(chart: Chart) -> str:
    """The chart under its title and legend, light or dark as the reader's system is."""
    box = f"0 {-HEAD} {WIDTH} {chart.height + HEAD}"
    title = escape(chart.title)
    legend = "".join(
        f'<path d="M{12 + STEP * place},-8h18" style="stroke: var(--c{key.colour})"/>'
        f'<text x="{35 + STEP * place}" y="-4">{escape(key.name)}</text>'
        for place, key in enumerate(chart.keys)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" width="{2 * WIDTH}" role="img">'
        f"<title>{title}</title><style>{theme()}</style>"
        f'<rect y="{-HEAD}" width="100%" height="100%" style="fill: var(--paper)"/>'
        f'<text x="8" y="{16 - HEAD}" style="fill: var(--ink); font-weight: 600">{title}</text>'
        f"{legend}{chart.elements}</svg>"
    )


def data_url(picture: str) -> str:
    """The SVG as a URL that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(picture.encode()).decode()
