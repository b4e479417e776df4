"""The curves of a run as pictures (SVG): how fast shards were made, and how a training goes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepspec.figures.charts import Point, Series, line_chart
from deepspec.figures.drawing import svg

MOST_POINTS = 120  # of a line: a picture is a few kB, however long the run
SHARDS_PER_POINT = 6  # on average: with fewer, the line would jump with each shard
HELD_OUT = "held_out_acceptance_length"
CURVES = (
    ("Loss", {"loss": "training"}),
    ("Acceptance length", {"acceptance_length": "training, expected", HELD_OUT: "held out"}),
)  # a title, and the names of the lines by the metric that they show


class Made(NamedTuple):
    """A shard that was committed, so many seconds after the stage began."""

    at_s: float
    tokens: int


def throughput(stage: str, made: Sequence[Made], seconds: float) -> str:
    """Tokens per minute over the stage's time, or shards per minute if no tokens are counted."""
    what = "tokens" if any(one.tokens for one in made) else "shards"
    amounts = [one.tokens if what == "tokens" else 1 for one in made]
    count = max(1, min(MOST_POINTS, len(made) // SHARDS_PER_POINT))
    seconds = max(seconds, 1e-3)
    at_s = [one.at_s for one in made]
    sums, edges = np.histogram(at_s, bins=count, range=(0, seconds), weights=amounts)
    minutes = np.array([0, *(edges[1:] + edges[:-1]) / 2, seconds]) / 60
    per_minute = np.pad(sums * count * 60 / seconds, 1, mode="edge")
    line = Series("", [*map(Point, minutes, per_minute)], 0, "plain")
    labels = ("minutes since the stage began", f"{what} per minute")
    return svg(line_chart(f"{stage}: {what} per minute", [line], labels=labels))


def training(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The loss, and the acceptance length in training and on held-out answers, over the steps.

    `lines` are those of metrics.jsonl; a curve of which they have no finite value is left out.
    """
    pictures = []
    for title, names in CURVES:
        series = []
        for colour, (field, name) in enumerate(names.items()):
            known = [
                (line["step"], line[field])
                for line in lines
                if math.isfinite(line.get(field, math.nan))
            ]
            groups = np.array_split(np.array(known), min(len(known), MOST_POINTS)) if known else []
            points = [Point(*group.mean(axis=0)) for group in groups]
            if points:
                series.append(
                    Series(name, points, colour, "marked" if field == HELD_OUT else "plain")
                )
        if series:
            pictures.append(svg(line_chart(title, series, labels=("step", title.lower()))))
    return pictures
