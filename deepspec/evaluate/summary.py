"""The summary of a result's rows per benchmark, domain and temperature, with 95 % intervals.

Acceptance is told of the first batch size alone, since it does not depend on it; speed of each
batch size by itself; losslessness of the answers at all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepspec.evaluate import counts as acceptance
from deepspec.evaluate.bootstrap import interval, intervals, pooled, resampled, total, weights
from deepspec.evaluate.counts import Array, Clock, Rows, Tally
from deepspec.evaluate.lossless import losslessness


class Part(NamedTuple):
    """One benchmark at one temperature: the sums of all of it, and of every resample."""

    benchmark: str
    domain: str
    rows: Rows  # of the first batch size
    answers: Rows  # of all batch sizes
    sums: Tally
    drawn: Tally | None  # None of a single prompt: it says nothing of how prompts differ
    speeds: dict[int, Speed]


class Speed(NamedTuple):
    """One batch size: the sums of all groups, and of every resample of them."""

    num_groups: int
    num_prompts: int
    sums: Clock
    drawn: Clock | None


def summarise(rows: Rows, *, dtype: str | None = None) -> dict[str, Any]:
    """The summary of rows that may be of any number of benchmarks, temperatures and batch sizes (at
    least one row).

    `dtype` is the number format that both ways of decoding computed in; None where it is not known.
    """
    temperatures = list(dict.fromkeys(row["temperature"] for row in rows))
    parts = {temperature: parts_of(rows, temperature) for temperature in temperatures}
    benchmarks = [
        {
            "benchmark": part.benchmark,
            "domain": part.domain,
            "temperature": temperature,
            **_metrics([part], temperature, dtype),
        }
        for temperature in temperatures
        for part in parts[temperature]
    ]
    overall = {
        str(temperature): _overall(parts[temperature], temperature, dtype)
        for temperature in temperatures
    }
    return {
        **overall[str(temperatures[0])],
        "temperature": temperatures[0],
        "temperatures": overall,
        "benchmarks": benchmarks,
    }


def parts_of(rows: Rows, temperature: float) -> list[Part]:
    """The benchmarks of one temperature, in the order of their rows."""
    positions, found = acceptance.longest_proposal(rows), []
    for name, of_benchmark in grouped(
        rows, lambda row: row["benchmark"] if row["temperature"] == temperature else None
    ):
        by_size = grouped(of_benchmark, lambda row: row["batch_size"])
        first = by_size[0][1]
        prompts = [of_prompt for _, of_prompt in grouped(first, lambda row: row["prompt"])]
        sums = acceptance.tally(prompts, positions)
        speeds = {size: _speed(of_size, key=(name, temperature, size)) for size, of_size in by_size}
        drawn = (
            resampled(sums, weights(len(prompts), key=(name, temperature)))
            if len(prompts) > 1
            else None
        )
        found.append(
            Part(name, first[0]["domain"], first, of_benchmark, total(sums), drawn, speeds)
        )
    return found


def _speed(rows: Rows, *, key: Hashable) -> Speed:
    groups = [of_group for _, of_group in grouped(rows, lambda row: row["group"])]
    sums = acceptance.clock(groups)
    drawn = resampled(sums, weights(len(groups), key=key)) if len(groups) > 1 else None
    return Speed(len(groups), len({row["prompt"] for row in rows}), total(sums), drawn)


def grouped(
    rows: Rows, key: Callable[[Mapping[str, Any]], Any]
) -> list[tuple[Any, list[Mapping[str, Any]]]]:
    """Rows by what `key` says of them, in order of appearance; None leaves a row out."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if (name := key(row)) is not None:
            groups.setdefault(name, []).append(row)
    return list(groups.items())


def _overall(parts: Sequence[Part], temperature: float, dtype: str | None) -> dict[str, Any]:
    """All benchmarks: pooled (micro), their mean (macro), and by domain."""
    micro = _metrics(parts, temperature, dtype)
    lengths = {part.benchmark: _number(acceptance.acceptance_length(part.sums)) for part in parts}
    macro = _macro(parts)
    domains = [
        {
            "domain": domain,
            "benchmarks": [part.benchmark for part in of_domain],
            **_metrics(of_domain, temperature, dtype),
        }
        for domain, of_domain in _by_domain(parts)
    ]
    named = {"macro": macro["acceptance_length"], **lengths}
    return {**micro, "acceptance_length": named, "micro": micro, "macro": macro, "domains": domains}


def _by_domain(parts: Sequence[Part]) -> list[tuple[str, list[Part]]]:
    domains = dict.fromkeys(part.domain for part in parts)
    return [(domain, [part for part in parts if part.domain == domain]) for domain in domains]


def _macro(parts: Sequence[Part]) -> dict[str, Any]:
    """Means over benchmarks, each counting the same however many prompts it has."""
    measures: dict[str, Callable[[Any], Array]] = {
        "acceptance_length": acceptance.acceptance_length,
        "verify_rate": acceptance.verify_rate,
        "speedup": acceptance.speedup,
    }
    found: dict[str, Any] = {"benchmarks": len(parts), "intervals": {}}
    for name, measure in measures.items():
        sides = [next(iter(part.speeds.values())) if name == "speedup" else part for part in parts]
        found[name] = _number(mean_of(measure(side.sums) for side in sides))
        found["intervals"][name] = interval(
            mean_of(measure(side.drawn if side.drawn else side.sums) for side in sides)
        )
        if not any(side.drawn for side in sides):
            found["intervals"][name] = None
    return found


def mean_of(values: Iterable[Array]) -> Array:
    """The mean of the benchmarks' values, resample by resample; one that has none (nothing was
    decoded) does not count.
    """
    known = [value for value in values if not np.isnan(value).all()]
    return np.asarray(sum(known) / len(known)) if known else np.asarray(np.nan)


def _metrics(parts: Sequence[Part], temperature: float, dtype: str | None) -> dict[str, Any]:
    """All metrics of some benchmarks' prompts taken together."""
    sums, drawn = pooled(part.sums for part in parts), _pooled_draws(parts)
    rows, answers = (
        [row for part in parts for row in part.rows],
        [row for part in parts for row in part.answers],
    )
    speeds = [
        _speed_metrics(size, [part.speeds[size] for part in parts if size in part.speeds])
        for size in _sizes(parts)
    ]
    first = speeds[0]
    return {
        "prompts": len({(row["benchmark"], row["prompt"]) for row in rows}),
        "rounds": int(sums.rounds),
        "tokens": sum(row["num_tokens"] for row in rows),
        "acceptance_length": _number(acceptance.acceptance_length(sums)),
        "prefix_acceptance": _numbers(acceptance.prefix_acceptance(sums)),
        "conditional_acceptance": _numbers(acceptance.conditional_acceptance(sums)),
        "reached": sums.reached.astype(int).tolist(),
        "tried": sums.tried.astype(int).tolist(),
        "verify_rate": _number(acceptance.verify_rate(sums)),
        **{name: first[name] for name in ("tokens_per_s", "speedup", "seconds")},
        "intervals": {**_intervals(drawn, len(sums.reached)), "speedup": first["interval"]},
        "batch_sizes": speeds,
        "lossless": [sum(bool(row["identical"]) for row in answers), len(answers)],
        "losslessness": losslessness(answers, temperature, dtype),
    }


def _pooled_draws(parts: Sequence[Part]) -> Tally | None:
    """The pooled resamples; a benchmark of one prompt stays as it is in each, and of nothing
    else there is no interval.
    """
    if not any(part.drawn for part in parts):
        return None
    return pooled(part.drawn or Tally(*(column[None] for column in part.sums)) for part in parts)


def _intervals(drawn: Tally | None, positions: int) -> dict[str, Any]:
    if drawn is None:
        alone: dict[str, Any] = {"acceptance_length": None, "verify_rate": None}
        return {
            **alone,
            **{
                name: [None] * positions for name in ("prefix_acceptance", "conditional_acceptance")
            },
        }
    return {
        "acceptance_length": interval(acceptance.acceptance_length(drawn)),
        "verify_rate": interval(acceptance.verify_rate(drawn)),
        "prefix_acceptance": intervals(acceptance.prefix_acceptance(drawn)),
        "conditional_acceptance": intervals(acceptance.conditional_acceptance(drawn)),
    }


def _sizes(parts: Sequence[Part]) -> list[int]:
    return list(dict.fromkeys(size for part in parts for size in part.speeds))


def _speed_metrics(size: int, speeds: Sequence[Speed]) -> dict[str, Any]:
    times = pooled(speed.sums for speed in speeds)
    drawn = [speed.drawn or Clock(*(column[None] for column in speed.sums)) for speed in speeds]
    known = any(speed.drawn for speed in speeds)
    seconds = {
        name: float(getattr(times, name))
        for name in ("plain_seconds", "seconds", "draft_seconds", "verify_seconds")
    }
    bookkeeping = seconds["seconds"] - seconds["draft_seconds"] - seconds["verify_seconds"]
    plain, speculative = (
        _number(acceptance.plain_tokens_per_s(times)),
        _number(acceptance.tokens_per_s(times)),
    )
    return {
        "batch_size": size,
        "groups": sum(speed.num_groups for speed in speeds),
        "prompts": sum(speed.num_prompts for speed in speeds),
        "tokens_per_s": {"plain": plain, "speculative": speculative},
        "speedup": _number(acceptance.speedup(times)),
        "interval": interval(acceptance.speedup(pooled(drawn))) if known else None,
        "seconds": {**seconds, "bookkeeping_seconds": bookkeeping},
    }


def _number(value: Array) -> float:
    """0 where nothing was decoded: the counts beside it tell that apart."""
    return float(np.nan_to_num(value))


def _numbers(values: Array) -> list[float]:
    return [float(value) for value in np.nan_to_num(values)]
