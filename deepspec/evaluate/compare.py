"""Two results on the same prompts: how much better B is than A, and how sure that is (a paired
bootstrap).

Rows belong together where benchmark, temperature and prompt digest are equal. Both sides of a pair
are drawn together, so that what makes a prompt hard for both drops out of the difference.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Literal, NamedTuple

import numpy as np

from deepspec.artifacts.records import Stored
from deepspec.artifacts.results import Interval
from deepspec.errors import ArtifactMismatch
from deepspec.evaluate import counts
from deepspec.evaluate.bootstrap import Resampled, SumsT, interval, mean_of, pool, resample
from deepspec.evaluate.counts import Array, Rows
from deepspec.evaluate.summary import grouped

Pair = tuple[Mapping[str, Any], Mapping[str, Any]]


class ComparedLine(Stored):
    """B against A: one benchmark, or all of them (`overall`), at one temperature.

    Acceptance counts `prompts`, speed counts `groups` of a batch size; other keys are unset.
    """

    temperature: float
    benchmark: str | None = None
    overall: Literal["micro", "macro"] | None = None
    batch_size: int | None = None
    prompts: int | None = None
    groups: int | None = None
    a: float
    b: float
    difference: float
    """b - a"""
    interval: Interval | None
    """95 % interval of the difference; None where only one prompt or group can be drawn."""
    above_zero: float | None
    """Share of resamples in which B is better; None as the interval."""


class Comparison(Stored):
    """Acceptance at each side's first batch size, and speed at each batch size that both have."""

    matched: int
    unmatched: tuple[int, int]
    """Prompts that are only in A, and only in B."""
    acceptance: list[ComparedLine]
    speed: list[ComparedLine]


class Measure(NamedTuple, Generic[SumsT]):
    """What is compared: a ratio of sums over units that are drawn together."""

    unit: Literal["prompt", "group"]
    sums: Callable[[Sequence[Rows]], SumsT]
    ratio: Callable[[SumsT], Array]


# Of acceptance, prompts are drawn with all their turns; of speed, the groups that A decoded
# together: a prompt's seconds are its share of its group's. Acceptance length needs no position of
# the block.
ACCEPTANCE = Measure("prompt", partial(counts.tally, positions=0), counts.acceptance_length)
SPEED = Measure("group", counts.clock, counts.speedup)


def compare(a: Rows, b: Rows) -> Comparison:
    """B against A per temperature and benchmark, over all rounds (micro), and as the mean of the
    benchmarks (macro).

    Raises:
        ArtifactMismatch: no prompt is in both.
    """
    by_size_a, by_size_b = (dict(grouped(side, lambda row: row["batch_size"])) for side in (a, b))
    first_a: Rows = next(iter(by_size_a.values()), [])
    first_b: Rows = next(iter(by_size_b.values()), [])
    pairs = match(first_a, first_b)
    if not pairs:
        same = "the same benchmarks, temperatures, chat template and thinking mode"
        raise ArtifactMismatch(
            "the two results have no prompt in common",
            where="benchmark, temperature, prompt_digest of their rows",
            fix=f"evaluate both with {same}",
        )
    speed = []
    for size, of_size in by_size_a.items():
        lines = _lines(match(of_size, by_size_b.get(size, [])), SPEED)
        speed += [line.model_copy(update={"batch_size": size}) for line in lines]
    return Comparison(
        matched=len(pairs),
        unmatched=(len(first_a) - len(pairs), len(first_b) - len(pairs)),
        acceptance=_lines(pairs, ACCEPTANCE),
        speed=speed,
    )


def match(a: Rows, b: Rows) -> list[Pair]:
    """Rows of A with those of B on the same prompt; a prompt that occurs twice is matched twice."""
    unmatched = dict(grouped(b, _prompt))
    return [(row, of_b.pop(0)) for row in a if (of_b := unmatched.get(_prompt(row)))]


def _prompt(row: Mapping[str, Any]) -> Hashable:
    return row["benchmark"], row["temperature"], row["prompt_digest"]


def _lines(pairs: Sequence[Pair], measure: Measure[SumsT]) -> list[ComparedLine]:
    lines = []
    for temperature, at_this in grouped(pairs, lambda pair: pair[0]["temperature"]):
        all_a, all_b = list[Resampled[SumsT]](), list[Resampled[SumsT]]()
        for name, of_benchmark in grouped(at_this, lambda pair: pair[0]["benchmark"]):
            units = [of_unit for _, of_unit in grouped(of_benchmark, lambda p: p[0][measure.unit])]
            a, b = (
                resample(
                    measure.sums([[pair[side] for pair in of_unit] for of_unit in units]),
                    key=(name, temperature),
                )
                for side in (0, 1)
            )
            all_a.append(a)
            all_b.append(b)
            fields = _difference([a], [b], measure)
            lines.append(ComparedLine(temperature=temperature, benchmark=name, **fields))
        micro = _difference([pool(all_a)], [pool(all_b)], measure)
        macro = _difference(all_a, all_b, measure)
        lines.append(ComparedLine(temperature=temperature, overall="micro", **micro))
        lines.append(ComparedLine(temperature=temperature, overall="macro", **macro))
    return lines


def _difference(
    a: Sequence[Resampled[SumsT]], b: Sequence[Resampled[SumsT]], measure: Measure[SumsT]
) -> dict[str, Any]:
    """The numbers of a line, of each side the mean of these benchmarks."""
    mean_a, mean_b = (mean_of(measure.ratio(part.total) for part in side) for side in (a, b))
    drawn_a, drawn_b = (mean_of(measure.ratio(part.drawn) for part in side) for side in (a, b))
    change = np.atleast_1d(drawn_b - drawn_a)
    known = change[~np.isnan(change)]
    is_sure = len(known) > 0 and any(part.varies for part in a)
    return {
        f"{measure.unit}s": sum(part.num_units for part in a),
        "a": float(np.nan_to_num(mean_a)),
        "b": float(np.nan_to_num(mean_b)),
        "difference": float(np.nan_to_num(mean_b - mean_a)),
        "interval": interval(change) if is_sure else None,
        "above_zero": float((known > 0).mean()) if is_sure else None,
    }
