"""Shapes of figures: where values land, and that nothing leaves its axes."""

from __future__ import annotations

from deepspec.figures.drawing import (
    Axis,
    Point,
    Series,
    bar_figure,
    from_zero,
    interval_figure,
    line_figure,
    nice_ticks,
    powers,
)


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(0, 5.46) == [0, 2, 4]
    assert nice_ticks(0, 1.1e-9)[0] == 0


def test_an_axis_puts_its_ends_where_they_belong():
    assert [Axis(0, 10, 100, 0).at(value) for value in (0, 5, 10)] == [100, 50, 0]
    assert [powers([1, 16]).at(value) for value in (1, 4, 16)] == [54, 196, 338]


def test_shapes_stay_inside_their_figures():
    points = [Point(k, k / 7, (k / 8, min(1, k / 6)), "note") for k in range(1, 8)]
    for figure in (
        line_figure(
            "a", [Series(points, 0)], labels=("x", "y"), x=range(1, 8), y=(0.0, 1.0), reference=0.5
        ),
        line_figure("log", [Series(points, 0)], labels=("x", "y"), x=powers([1, 7])),
        line_figure(
            "free", [Series(points, 0)], labels=("x", "y"), x=from_zero(7.0), reference="diagonal"
        ),
        interval_figure(
            "b",
            [("one", [Point(2.0, 0, (1.5, 2.5)), None]), ("two", [None, Point(1.0, 0)])],
            label="x",
            reference=1.0,
        ),
        bar_figure("c", [("one", [("draft", 1.0, 0), ("verify", 2.0, 1)])], label="s"),
    ):
        left, top, right, bottom = figure.plot
        for mark in figure.marks:
            assert left <= mark.x <= right and top <= mark.y <= bottom
        for bar in figure.bars:
            assert left <= bar.x and bar.x + bar.width <= right
        assert figure.alt.startswith(figure.title)


def test_an_interval_becomes_a_band_and_a_missing_one_a_gap_in_it():
    known = [Point(1, 0.5, (0.4, 0.6)), Point(2, 0.5, (0.3, 0.7)), Point(3, 0.5)]
    stroke = line_figure(
        "a", [Series(known, 0)], labels=("x", "y"), x=[1, 2, 3], y=(0.0, 1.0)
    ).strokes[0]
    assert (stroke.path.count("L"), stroke.band.count("L")) == (2, 3)
    assert (
        line_figure("a", [Series(known[1:], 0)], labels=("x", "y"), x=[1, 2, 3], y=(0.0, 1.0))
        .strokes[0]
        .band
        == ""
    )


def test_a_figure_says_in_words_what_it_shows():
    figure = line_figure(
        "Speed",
        [Series([Point(1, 2.0, note="batch 1: 2.00")], 0), Series([Point(1, 1.0)], 0, faint=True)],
        labels=("x", "y"),
        x=[0, 1],
    )
    assert figure.alt == "Speed. batch 1: 2.00"
