"""Two results on the same prompts: how much better B is than A, and how sure that is (a paired
bootstrap).

Rows belong together where benchmark, temperature and prompt digest are equal. Both sides of a pair
are drawn together, so that what makes a prompt hard for both drops out of the difference.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from deepspec.artifacts.records import Stored
from deepspec.artifacts.results import Interval
from deepspec.errors import ArtifactMismatch
from deepspec.evaluate.counts import (
    Array,
    Resampled,
    Rows,
    Sums,
    add_up,
    drawn_by,
    interval,
    mean_of,
    number,
    pool,
    resample,
)
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


def compare(a: Rows, b: Rows) -> Comparison:
    """B against A per temperature and benchmark, over all rounds (micro), and as the mean of the
    benchmarks (macro).

    Raises:
        ArtifactMismatch: no prompt is in both.
    """
    by_size_a, by_size_b = (grouped(side, itemgetter("batch_size")) for side in (a, b))
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
    drawn = [drawn_by(of_pairs) for of_pairs in zip(*pairs, strict=True)]
    side = drawn.index("group") if "group" in drawn else 0
    # Of acceptance, prompts are drawn with all their turns; of speed, the groups that A decoded
    # together: a prompt's seconds are its share of its group's.
    return Comparison(
        matched=len(pairs),
        unmatched=(len(first_a) - len(pairs), len(first_b) - len(pairs)),
        acceptance=_lines(pairs, drawn[side], Sums.acceptance_length, side=side),
        speed=[
            line
            for size, of_size in by_size_a.items()
            for line in _lines(
                match(of_size, by_size_b.get(size, [])), "group", Sums.speedup, batch_size=size
            )
        ],
    )


def match(a: Rows, b: Rows) -> list[Pair]:
    """Rows of A with those of B on the same prompt; a prompt that occurs twice is matched twice."""
    prompt = itemgetter("benchmark", "temperature", "prompt_digest")
    unmatched = grouped(b, prompt)
    return [(row, of_b.pop(0)) for row in a if (of_b := unmatched.get(prompt(row)))]


def _lines(
    pairs: Sequence[Pair],
    unit: Literal["prompt", "group"],
    measure: Callable[[Sums], Array],
    *,
    side: int = 0,
    **fields: int,
) -> list[ComparedLine]:
    """`side` is that of a pair whose units are drawn."""
    lines = []
    for temperature, at_this in grouped(pairs, lambda pair: pair[0]["temperature"]).items():
        parts = {}
        for name, of_benchmark in grouped(at_this, lambda pair: pair[0]["benchmark"]).items():
            units = grouped(of_benchmark, lambda pair: pair[side][unit]).values()
            parts[name] = [
                resample(
                    add_up([pair[of] for pair in of_unit] for of_unit in units),
                    key=(name, temperature),
                )
                for of in (0, 1)
            ]
        pooled = [pool(of_side) for of_side in zip(*parts.values(), strict=True)]
        named = {"temperature": temperature, **fields}
        lines += [
            *(
                _line([both], unit, measure, benchmark=name, **named)
                for name, both in parts.items()
            ),
            _line([pooled], unit, measure, overall="micro", **named),
            _line([*parts.values()], unit, measure, overall="macro", **named),
        ]
    return lines


def _line(
    benchmarks: Sequence[Sequence[Resampled]],
    unit: str,
    measure: Callable[[Sums], Array],
    **fields: Any,
) -> ComparedLine:
    """B against A: of both, the mean of these benchmarks, each resampled for A and for B."""
    of_a, of_b = zip(*benchmarks, strict=True)
    a, b = (mean_of([measure(part.sums) for part in side]) for side in (of_a, of_b))
    change = b - a
    known = change[1:][~np.isnan(change[1:])]
    middle = interval(change) if any(part.varies for part in of_a) else None
    fields[f"{unit}s"] = sum(part.num_units for part in of_a)
    return ComparedLine(
        **fields,
        a=number(a),
        b=number(b),
        difference=number(change),
        interval=middle,
        above_zero=float((known > 0).mean()) if middle else None,
    )
