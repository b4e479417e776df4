"""A figure as a picture that needs nothing but itself: one SVG, or a `data:` URL that any page
or Markdown shows.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from deepspec.figures.drawing import Figure

# room above the axes for the title, and for the names of the lines under it
HEAD, HEAD_WITH_KEYS = 24, 42


class Key(NamedTuple):
    """What a colour (and a dash) stands for."""

    name: str
    colour: int
    dashed: bool = False


def svg(figure: Figure, keys: Sequence[Key] = ()) -> str:
    """The figure with its title and the names of its lines, light or dark as the reader's
    system is.
    """
    environment = Environment(
        loader=PackageLoader("deepspec.figures", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("picture.svg.j2")
    step = (figure.width - 24) / max(len(keys), 1)
    return template.render(
        figure=figure, keys=keys, head=HEAD_WITH_KEYS if keys else HEAD, step=step
    )


def data_url(picture: str) -> str:
    """The SVG as a URL that holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(picture.encode()).decode()
