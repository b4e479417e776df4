"""A chart as a picture that needs nothing but itself: one SVG, or a `data:` URL that any page or
Markdown shows.
"""

import base64
from html import escape

from deepspec.figures.drawing import WIDTH, Chart, theme

HEAD = 38  # room for the title and the legend
STEP = 150  # from one name of the legend to the next


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
