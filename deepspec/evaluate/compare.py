"""Two results on the same prompts: how much better B is than A, and how sure that is (a paired
bootstrap).

Rows belong together where benchmark, temperature and prompt digest are equal. Both sides of a pair
are drawn together, so that what makes a prompt hard for both drops out of the difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from deepspec.errors import ArtifactMismatch
from deepspec.evaluate import counts as acceptance
from deepspec.evaluate.bootstrap import interval, pooled, resampled, total, weights
from deepspec.evaluate.counts import Array, Rows
from deepspec.evaluate.summary import mean_of

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


class Kind(NamedTuple):
    """What is compared: a measure of sums over units that are drawn together."""

    unit: Literal["prompt", "group"]
    count: Callable[[Sequence[Rows]], Any]
    measure: Callable[[Any], Array]


class Side(NamedTuple):
    """One benchmark's sums in one of the two results: of all matched prompts, and of every
    resample.
    """

    units: int
    sums: Any  # what the kind counts: a Tally, or a Clock
    drawn: Any


# Of acceptance prompts are drawn, with all their turns; of speed the groups that A decoded
# together: a prompt's seconds are its share of its group's. Acceptance length needs no position of
# the block.
ACCEPTANCE = Kind("prompt", partial(acceptance.tally, positions=0), acceptance.acceptance_length)
SPEED = Kind("group", acceptance.clock, acceptance.speedup)


def compare(a: Rows, b: Rows) -> dict[str, Any]:
    """Per temperature and benchmark, over all rounds (micro) and over benchmarks (macro): B against
    A.

    `acceptance` is of each side's first batch size; `speed` has each batch size that both have.
    Every line has `a`, `b`, `difference` (b - a), its 95 % `interval` and `above_zero`, the share
    of resamples in which B is better; the last two are null where there is but one prompt or group
    to draw from.

    Raises:
        ArtifactMismatch: no prompt is in both.
    """
    first_a, first_b = _of_first_size(a), _of_first_size(b)
    pairs = match(first_a, first_b)
    if not pairs:
        what = "the two results have no prompt in common"
        fix = "evaluate both on the same benchmarks, at the same temperature, with the same chat template and thinking mode"
        raise ArtifactMismatch(
            what, where="benchmark, temperature, prompt_digest of their rows", fix=fix
        )
    sizes = [
        size
        for size in dict.fromkeys(row["batch_size"] for row in a)
        if any(row["batch_size"] == size for row in b)
    ]
    return {
        "matched": len(pairs),
        "unmatched": [len(first_a) - len(pairs), len(first_b) - len(pairs)],
        "acceptance": _lines(pairs, ACCEPTANCE),
        "speed": [
            {"batch_size": size, **line}
            for size in sizes
            for line in _lines(match(_of_size(a, size), _of_size(b, size)), SPEED)
        ],
    }


def match(a: Rows, b: Rows) -> list[Pair]:
    """Rows of A with those of B on the same prompt; a prompt that is there twice is matched
    twice.
    """
    there = {key: row for key, row in zip(_keys(b), b, strict=True)}
    return [(row, there[key]) for key, row in zip(_keys(a), a, strict=True) if key in there]


def _keys(rows: Rows) -> list[Hashable]:
    seen: Counter[Hashable] = Counter()
    keys: list[Hashable] = []
    for row in rows:
        key = (row["benchmark"], row["temperature"], row["prompt_digest"])
        keys.append((*key, seen[key]))
        seen[key] += 1
    return keys


def _of_first_size(rows: Rows) -> Rows:
    return _of_size(rows, rows[0]["batch_size"]) if rows else rows


def _of_size(rows: Rows, size: int) -> Rows:
    return [row for row in rows if row["batch_size"] == size]


def _lines(pairs: Sequence[Pair], kind: Kind) -> list[dict[str, Any]]:
    lines = []
    for temperature, at_this in _grouped(pairs, "temperature"):
        found = {
            name: _sides(of_benchmark, kind, key=(name, temperature))
            for name, of_benchmark in _grouped(at_this, "benchmark")
        }
        for name, sides in found.items():
            lines.append(
                {
                    "temperature": temperature,
                    "benchmark": name,
                    **_difference([sides[0]], [sides[1]], kind),
                }
            )
        all_a, all_b = zip(*found.values(), strict=True)
        lines.append(
            {
                "temperature": temperature,
                "overall": "micro",
                **_difference([_pooled(all_a)], [_pooled(all_b)], kind),
            }
        )
        lines.append(
            {"temperature": temperature, "overall": "macro", **_difference(all_a, all_b, kind)}
        )
    return lines


def _sides(pairs: Sequence[Pair], kind: Kind, *, key: Hashable) -> tuple[Side, Side]:
    units = [of_unit for _, of_unit in _grouped(pairs, kind.unit)]
    drawn = weights(len(units), key=key)
    a, b = (kind.count([[pair[side] for pair in of_unit] for of_unit in units]) for side in (0, 1))
    return Side(len(units), total(a), resampled(a, drawn)), Side(
        len(units), total(b), resampled(b, drawn)
    )


def _pooled(sides: Sequence[Side]) -> Side:
    return Side(
        sum(side.units for side in sides),
        pooled(side.sums for side in sides),
        pooled(side.drawn for side in sides),
    )


def _difference(a: Sequence[Side], b: Sequence[Side], kind: Kind) -> dict[str, Any]:
    """B against A, both the mean of these benchmarks."""
    mean_a, mean_b = (mean_of(kind.measure(side.sums) for side in sides) for sides in (a, b))
    drawn_a, drawn_b = (mean_of(kind.measure(side.drawn) for side in sides) for sides in (a, b))
    change = np.atleast_1d(drawn_b - drawn_a)
    known = change[~np.isnan(change)]
    sure = len(known) > 0 and any(side.units > 1 for side in a)
    return {
        f"{kind.unit}s": sum(side.units for side in a),
        "a": float(np.nan_to_num(mean_a)),
        "b": float(np.nan_to_num(mean_b)),
        "difference": float(np.nan_to_num(mean_b - mean_a)),
        "interval": interval(change) if sure else None,
        "above_zero": float((known > 0).mean()) if sure else None,
    }


def _grouped(pairs: Sequence[Pair], name: str) -> list[tuple[Any, list[Pair]]]:
    groups: dict[Any, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair[0][name], []).append(pair)
    return list(groups.items())
