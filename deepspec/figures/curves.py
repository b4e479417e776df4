"""What a run shows as curves: how fast shards were made, and how a training goes. Pictures,
from what the stages report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepspec.figures.drawing import Point, Series, from_zero, line_figure
from deepspec.figures.picture import Key, svg

MOST_POINTS = 120  # of a line: a picture is a few kB, however long the run
SHARDS_PER_POINT = 6  # on average: with fewer, the line would jump with each shard
BY_STEP = {
    "loss": ("Loss", {"loss": "training"}),
    "acceptance length": (
        "Acceptance length",
        {"acceptance_length": "training, expected", "held_out_acceptance_length": "held out"},
    ),
}  # the label of the y axis: title, and the names of the lines


class Made(NamedTuple):
    """A shard that was committed, so many seconds after the stage began."""

    at_s: float
    tokens: int


def throughput(stage: str, made: Sequence[Made], seconds: float) -> str:
    """A picture (SVG) of tokens per minute over the stage's time; shards per minute where no
    tokens are counted.
    """
    count = max(1, min(MOST_POINTS, len(made) // SHARDS_PER_POINT))
    seconds = max(seconds, 1e-3)
    width_s = seconds / count
    by_tokens = any(one.tokens for one in made)
    sums = [0] * count
    for one in made:
        sums[min(int(one.at_s / width_s), count - 1)] += one.tokens if by_tokens else 1
    points = [
        Point((number + 0.5) * width_s / 60, total * 60 / width_s, radius=0)
        for number, total in enumerate(sums)
    ]
    ends = [Point(0, points[0].y, radius=0), *points, Point(seconds / 60, points[-1].y, radius=0)]
    what = "tokens" if by_tokens else "shards"
    title = f"{stage}: {what} per minute"
    figure = line_figure(
        title,
        [Series(ends, 0)],
        labels=("minutes since the stage began", f"{what} per minute"),
        x=from_zero(seconds / 60),
    )
    return svg(figure)


def training(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Pictures (SVG) of the loss, and of the acceptance length while training and on held-out
    answers, over the steps so far.
    """
    drawn = []
    for label, (title, names) in BY_STEP.items():
        series, keys = list[Series](), list[Key]()
        for colour, (field, name) in enumerate(names.items()):
            if points := _thinned(
                [
                    (line["step"], line[field])
                    for line in lines
                    if math.isfinite(line.get(field, math.nan))
                ]
            ):
                dots = 2.6 if field.startswith("held_out") else 0.0
                series.append(
                    Series([Point(step, value, radius=dots) for step, value in points], colour)
                )
                keys.append(Key(name, colour))
        if series:
            drawn.append(_over_steps(title, label, series, keys))
    return drawn


def _over_steps(title: str, label: str, series: Sequence[Series], keys: Sequence[Key]) -> str:
    last = max(point.x for one in series for point in one.points)
    figure = line_figure(title, series, labels=("step", label), x=from_zero(last))
    return svg(figure, keys)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`, each the mean of those in its place."""
    size = -(-len(points) // MOST_POINTS)
    groups = (
        [points[first : first + size] for first in range(0, len(points), size)] if points else []
    )
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
