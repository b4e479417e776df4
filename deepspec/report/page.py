"""A report as sections of tables, figures and text, written as one HTML file or as Markdown.

The HTML needs nothing but itself: no scripts, no fonts, no requests. The templates escape every
name that a user chose.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from deepspec.figures.drawing import WIDTH, Chart, Key, theme

Format = Literal["html", "markdown"]
ENDINGS = {"html": "html", "markdown": "md"}  # of files


class Table(NamedTuple):
    """Rows of cells by the names of their columns, which are the same in all rows.

    The first `words` columns are text, the others numbers; the rows whose numbers are in `strong`
    stand out.
    """

    title: str
    rows: Sequence[Mapping[str, str]]
    words: int = 1
    strong: frozenset[int] = frozenset()
    note: str = ""

    @property
    def header(self) -> Sequence[str]:
        """The names of the columns."""
        return list(self.rows[0]) if self.rows else []


class Gallery(NamedTuple):
    """Charts with one legend."""

    title: str
    charts: Sequence[Chart]
    note: str = ""

    @property
    def keys(self) -> list[Key]:
        """The legend: what the colours of all charts stand for, each once."""
        return list(dict.fromkeys(key for chart in self.charts for key in chart.keys))


class Preformatted(NamedTuple):
    """Lines that keep their spaces."""

    title: str
    lines: Sequence[str]


class Finding(NamedTuple):
    """Something that is wrong, in red, and what may be the reasons."""

    what: str
    causes: Sequence[str]


class ReportSection(NamedTuple):
    """A heading of the report's table of contents, and what is under it."""

    title: str
    blocks: Sequence[Table | Gallery | Preformatted | Finding]
    text: str = ""


class Fact(NamedTuple):
    """One of the few numbers that a reader looks for first."""

    name: str
    value: str
    detail: str


class Page(NamedTuple):
    """A whole report; `facts` are by run."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, Sequence[Fact]]]
    sections: Sequence[ReportSection]


def render_page(page: Page, form: Format) -> str:
    """The page as text; equal pages give equal texts."""
    environment = Environment(
        loader=PackageLoader("deepspec.report", "templates"),
        autoescape=form == "html",
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=_cell, anchor=_anchor)
    template = environment.get_template(f"report.{ENDINGS[form]}.j2")
    return template.render(page=page, width=WIDTH, theme=theme())


def for_terminal(table: Table) -> RichTable:
    """The table as rich prints it."""
    shown = RichTable(
        title=table.title,
        title_justify="left",
        box=SIMPLE_HEAD,
        caption=table.note or None,
        caption_justify="left",
    )
    for number, name in enumerate(table.header):
        shown.add_column(name, justify="left" if number < table.words else "right")
    for number, row in enumerate(table.rows):
        shown.add_row(*map(Text, row.values()), style="bold" if number in table.strong else None)
    return shown


def _cell(text: str) -> str:
    """Text that breaks no Markdown table and starts no HTML."""
    escaped = re.sub(r"([\\`*_|\[\]])", r"\\\1", text.replace("\n", " "))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
