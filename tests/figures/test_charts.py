"""Charts: where values land, what is written at the axes, and that nothing leaves a chart."""

import re
from xml.etree import ElementTree

import pytest

from deepspec.figures.charts import (
    Estimate,
    Point,
    Series,
    bar_chart,
    interval_chart,
    line_chart,
    ranged,
)
from deepspec.figures.drawing import WIDTH, Chart

LABELS = ("x", "y")


def elements(chart: Chart, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(f"<svg>{chart.elements}</svg>").iter(tag))


def texts(chart: Chart) -> list[str]:
    return ["".join(text.itertext()) for text in elements(chart, "text")]


def vertices(path: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", path.get("d", ""))]


def of_colour(chart: Chart, number: int) -> list[ElementTree.Element]:
    return [path for path in elements(chart, "path") if f"--c{number})" in path.get("style", "")]


@pytest.fixture(scope="module")
def charts() -> list[Chart]:
    points = [Point(k, k / 7, (k / 8, min(1, k / 6)), "note") for k in range(1, 8)]
    series = [Series("run", points, 0), Series("other", points, 1, "faint")]
    rows = [("one", [Estimate(2.0, (1.5, 2.5)), None]), ("two", [None, Estimate(1.0, None)])]
    return [
        line_chart("a", series, labels=LABELS, x="whole numbers", y=(0.0, 1.0), reference=0.5),
        line_chart("log", series, labels=LABELS, x="powers of two"),
        line_chart("free", series, labels=LABELS, reference="diagonal"),
        line_chart("empty", [], labels=LABELS),
        interval_chart("b", rows, names=["left", "right"], label="x", reference=1.0),
        bar_chart("c", [("one", [("draft", 1.0, 0), ("verify", 2.0, 1)])], label="s"),
    ]


def test_everything_stays_inside_its_chart(charts: list[Chart]):
    for chart in charts:
        for path in elements(chart, "path"):
            for x, y in vertices(path):
                assert 0 <= x <= WIDTH and 0 <= y <= chart.height, (chart.title, path.attrib)


def test_values_land_where_the_axes_have_them():
    points = [Point(1, 0.0), Point(2, 0.5), Point(3, 1.0)]
    chart = line_chart("a", [Series("run", points, 0)], labels=LABELS, y=(0.0, 1.0))
    (low, middle, high) = vertices(of_colour(chart, 0)[0])
    assert (low[1], middle[1], high[1]) == (194, 103, 12), "the axes reach from 12 to 194"
    assert middle[0] - low[0] == pytest.approx(high[0] - middle[0])


def test_ticks_are_round_and_large_ones_short():
    def ticks(highest: float, **kind) -> list[str]:
        points = [Point(1, 0.0), Point(highest, highest)]
        return texts(line_chart("a", [Series("run", points, 0)], labels=LABELS, **kind))

    assert ticks(5.46) == [*"012345", "x", *"012345", "y"]
    assert ticks(16, x="powers of two")[:6] == ["1", "2", "4", "8", "16", "x"]
    assert ticks(7, x="whole numbers")[:8] == [*"1234567", "x"]
    assert {"5000", "10k", "20k"} <= {*ticks(25_600)} and {"10M", "20M"} <= {*ticks(2.5e7)}


def test_an_interval_becomes_a_band_and_a_missing_one_a_gap_in_it():
    known = [Point(1, 0.5, (0.4, 0.6)), Point(2, 0.5, (0.3, 0.7)), Point(3, 0.5)]
    chart = line_chart("a", [Series("run", known, 0)], labels=LABELS, y=(0.0, 1.0))
    band, line, *marks = of_colour(chart, 0)
    assert "opacity" in band.get("style", "")
    assert (len({*vertices(band)}), len(vertices(line)), len(marks)) == (4, 3, 3)
    alone = line_chart("a", [Series("run", known[1:], 0)], labels=LABELS, y=(0.0, 1.0))
    assert not any("opacity" in path.get("style", "") for path in elements(alone, "path"))


def test_a_row_has_a_whisker_and_a_mark_for_each_run_and_nothing_for_a_missing_value():
    rows = [("one", [Estimate(2.0, (1.5, 2.5)), None]), ("two", [None, Estimate(1.0, None)])]
    chart = interval_chart("b", rows, names=["left", "right"], label="x", reference=1.0)
    (low, high), (mark, _) = map(vertices, of_colour(chart, 0))
    assert low[0] < mark[0] < high[0] and low[1] == mark[1] == high[1]
    ((other, _),) = [vertices(path) for path in of_colour(chart, 1) if vertices(path)]
    assert other[1] > mark[1], "the second row is beneath the first"
    assert chart.alt == "b. one, left: 2.00 (1.50–2.50); two, right: 1.00"


def test_the_parts_of_a_bar_stand_side_by_side():
    chart = bar_chart(
        "c", [("a name that is far too long", [("draft", 1.0, 0), ("verify", 2.0, 1)])], label="s"
    )
    draft, verify = (vertices(of_colour(chart, number)[0]) for number in (0, 1))
    assert max(x for x, _ in draft) == min(x for x, _ in verify)
    assert "a name that is …" in texts(chart)
    assert chart.alt.endswith("draft 1; a name that is far too long: verify 2")


def test_the_text_of_a_chart_has_its_values_and_a_mark_those_of_its_own():
    series = [
        Series("run", [Point(1, 2.0, (1.5, 2.5), " of 9")], 0),
        Series("other", [Point(1, 1.0)], 1, "faint"),
    ]
    chart = line_chart("Speed", series, labels=("batch", "speed-up"), x="powers of two")
    assert chart.alt == "Speed. run, batch 1: speed-up 2.00 (1.50–2.50) of 9"
    assert [title.text for title in elements(chart, "title")] == [chart.alt.removeprefix("Speed. ")]
    assert [key.name for key in chart.keys] == ["run"]


def test_an_estimate_is_written_with_its_interval():
    assert ranged(2.306, (2.2, 2.42)) == "2.31 (2.20–2.42)"
    assert ranged(1234.5, None) == "1,234.50"
