"""What matplotlib draws becomes SVG that a page can have many of, in the page's own colours."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import pytest

from deepspec.figures.charts import Point, Series, bar_chart, line_chart
from deepspec.figures.drawing import Chart, svg, theme

NASTY = "$x^ <b>&\"'</b> \\frac 中文"


def nasty_chart() -> Chart:
    series = [Series(NASTY, [Point(1, 2.0, (1, 3), NASTY), Point(2, 3.0)], 9)]
    return line_chart(NASTY, series, labels=(NASTY, NASTY))


def test_a_chart_has_nothing_that_is_once_in_a_page_and_only_the_themes_colours():
    for chart in (nasty_chart(), bar_chart("a", [("b", [("c", 1.0, 2)])], label="d")):
        assert not {"id=", "url(", "#", "font", "<style"} & {
            word for word in ("id=", "url(", "#", "font", "<style") if word in chart.elements
        }
        for name in ("--quiet", "--rule"):
            assert f"var({name})" in chart.elements and f"{name}:" in theme()
    assert "var(--c1)" in nasty_chart().elements, "colours begin again after the eighth"


@pytest.mark.filterwarnings("error")
def test_names_of_users_are_text_and_nothing_else():
    """A $ is no formula, a < no element, and a letter without a glyph in matplotlib no warning."""
    chart = nasty_chart()
    root = ElementTree.fromstring(svg(chart))
    texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count(NASTY) == 4, "title, both axes and the legend"
    assert chart.alt.count(NASTY) == 1 + 2 * 3 + 1


def test_equal_charts_are_equal_texts_in_any_thread():
    with ThreadPoolExecutor(4) as threads:
        drawn = list(threads.map(lambda _: nasty_chart(), range(8)))
    assert set(drawn) == {nasty_chart()}


def test_only_a_chart_imports_matplotlib():
    modules = (
        "deepspec.__main__, deepspec.cli.inspection, deepspec.report.report, flows.stage_artifacts"
    )
    code = f"import sys, {modules}; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
