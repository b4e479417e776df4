"""The summary of a result's rows per benchmark, domain and temperature, with 95 % intervals.

Acceptance is that of the first batch size alone, since it does not depend on it; speed is that of
each batch size; losslessness is that of the answers at all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from deepspec.artifacts.results import (
    BatchSpeed,
    BenchmarkMetrics,
    DomainMetrics,
    EvaluationSummary,
    Interval,
    MeanIntervals,
    MeanMetrics,
    MetricIntervals,
    Metrics,
    OverallMetrics,
    PhaseSeconds,
    TokensPerSecond,
)
from deepspec.evaluate import counts
from deepspec.evaluate.bootstrap import (
    Resampled,
    SumsT,
    interval,
    intervals,
    mean_of,
    pool,
    resample,
)
from deepspec.evaluate.counts import Array, Clock, Rows, Tally
from deepspec.evaluate.lossless import losslessness

T = TypeVar("T")


class BatchTimes(NamedTuple):
    """One benchmark at one batch size; what is drawn are groups that were decoded together."""

    num_prompts: int
    times: Resampled[Clock]


class Part(NamedTuple):
    """One benchmark at one temperature; what is drawn are prompts."""

    benchmark: str
    domain: str
    rows: Rows  # of the first batch size
    answers: Rows  # of all batch sizes
    rounds: Resampled[Tally]
    by_size: dict[int, BatchTimes]


def summarise(rows: Rows, *, dtype: str | None = None) -> EvaluationSummary:
    """The summary of rows of any number of benchmarks, temperatures and batch sizes.

    There is at least one row. `dtype` is the number format that both ways of decoding computed in;
    None where it is not known.
    """
    positions = counts.longest_proposal(rows)
    benchmarks, overall = list[BenchmarkMetrics](), dict[float, OverallMetrics]()
    for temperature, at_this in grouped(rows, lambda row: row["temperature"]):
        parts = [
            _part(name, temperature, of_benchmark, positions)
            for name, of_benchmark in grouped(at_this, lambda row: row["benchmark"])
        ]
        overall[temperature] = _overall(parts, temperature, dtype)
        for part in parts:
            metrics = _metrics([part], temperature, dtype)
            named = {"benchmark": part.benchmark, "domain": part.domain}
            benchmarks.append(BenchmarkMetrics(**dict(metrics), **named, temperature=temperature))
    first = next(iter(overall))
    return EvaluationSummary(
        **dict(overall[first]), temperature=first, temperatures=overall, benchmarks=benchmarks
    )


def grouped(rows: Iterable[T], key: Callable[[T], Any]) -> list[tuple[Any, list[T]]]:
    """Rows by their key, in order of appearance."""
    groups: dict[Any, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _part(name: str, temperature: float, rows: Rows, positions: int) -> Part:
    by_size = grouped(rows, lambda row: row["batch_size"])
    first = by_size[0][1]
    prompts = [of_prompt for _, of_prompt in grouped(first, lambda row: row["prompt"])]
    rounds = resample(counts.tally(prompts, positions), key=(name, temperature))
    times = {}
    for size, of_size in by_size:
        groups = [of_group for _, of_group in grouped(of_size, lambda row: row["group"])]
        num_prompts = len({row["prompt"] for row in of_size})
        drawn = resample(counts.clock(groups), key=(name, temperature, size))
        times[size] = BatchTimes(num_prompts, drawn)
    return Part(name, first[0]["domain"], first, rows, rounds, times)


def _overall(parts: Sequence[Part], temperature: float, dtype: str | None) -> OverallMetrics:
    micro, macro = _metrics(parts, temperature, dtype), _macro(parts)
    lengths = {
        part.benchmark: _number(counts.acceptance_length(part.rounds.total)) for part in parts
    }
    domains = [
        DomainMetrics(
            **dict(_metrics(of_domain, temperature, dtype)),
            domain=domain,
            benchmarks=[part.benchmark for part in of_domain],
        )
        for domain, of_domain in grouped(parts, lambda part: part.domain)
    ]
    pooled = {**dict(micro), "acceptance_length": {"macro": macro.acceptance_length, **lengths}}
    return OverallMetrics(**pooled, micro=micro, macro=macro, domains=domains)


def _macro(parts: Sequence[Part]) -> MeanMetrics:
    rounds = [part.rounds for part in parts]
    times = [next(iter(part.by_size.values())).times for part in parts]
    measured = {
        "acceptance_length": _mean(rounds, counts.acceptance_length),
        "verify_rate": _mean(rounds, counts.verify_rate),
        "speedup": _mean(times, counts.speedup),
    }
    return MeanMetrics(
        benchmarks=len(parts),
        intervals=MeanIntervals(**{name: known for name, (_, known) in measured.items()}),
        **{name: mean for name, (mean, _) in measured.items()},
    )


def _mean(
    parts: Sequence[Resampled[SumsT]], measure: Callable[[SumsT], Array]
) -> tuple[float, Interval | None]:
    varies = any(part.varies for part in parts)
    drawn = mean_of(measure(part.drawn) for part in parts)
    return (
        _number(mean_of(measure(part.total) for part in parts)),
        interval(drawn) if varies else None,
    )


def _metrics(parts: Sequence[Part], temperature: float, dtype: str | None) -> Metrics:
    """All metrics of some benchmarks' prompts taken together."""
    rounds = pool([part.rounds for part in parts])
    sums, drawn = rounds.total, rounds.drawn
    rows = [row for part in parts for row in part.rows]
    answers = [row for part in parts for row in part.answers]
    sizes = dict.fromkeys(size for part in parts for size in part.by_size)
    speeds = [
        _batch_speed(size, [part.by_size[size] for part in parts if size in part.by_size])
        for size in sizes
    ]
    first = speeds[0]
    lossless = losslessness(answers, temperature, dtype)
    return Metrics(
        prompts=len({(row["benchmark"], row["prompt"]) for row in rows}),
        rounds=int(sums.rounds),
        tokens=sum(row["num_tokens"] for row in rows),
        acceptance_length=_number(counts.acceptance_length(sums)),
        prefix_acceptance=_numbers(counts.prefix_acceptance(sums)),
        conditional_acceptance=_numbers(counts.conditional_acceptance(sums)),
        reached=sums.reached.tolist(),
        tried=sums.tried.tolist(),
        verify_rate=_number(counts.verify_rate(sums)),
        tokens_per_s=first.tokens_per_s,
        speedup=first.speedup,
        seconds=first.seconds,
        intervals=MetricIntervals(
            acceptance_length=rounds.interval(counts.acceptance_length),
            verify_rate=rounds.interval(counts.verify_rate),
            speedup=first.interval,
            prefix_acceptance=intervals(counts.prefix_acceptance(drawn)),
            conditional_acceptance=intervals(counts.conditional_acceptance(drawn)),
        ),
        batch_sizes=speeds,
        lossless=(lossless.identical, lossless.prompts),
        losslessness=lossless,
    )


def _batch_speed(size: int, parts: Sequence[BatchTimes]) -> BatchSpeed:
    times = pool([part.times for part in parts])
    sums = times.total
    seconds = {name: float(value) for name, value in sums._asdict().items()}
    bookkeeping = float(sums.seconds - sums.draft_seconds - sums.verify_seconds)
    return BatchSpeed(
        batch_size=size,
        groups=times.num_units,
        prompts=sum(part.num_prompts for part in parts),
        tokens_per_s=TokensPerSecond(
            plain=_number(counts.plain_tokens_per_s(sums)),
            speculative=_number(counts.tokens_per_s(sums)),
        ),
        speedup=_number(counts.speedup(sums)),
        interval=times.interval(counts.speedup),
        seconds=PhaseSeconds(**seconds, bookkeeping_seconds=bookkeeping),
    )


def _number(value: Array) -> float:
    """0 where nothing was decoded: the counts alongside it tell that apart."""
    return float(np.nan_to_num(value))


def _numbers(values: Array) -> list[float]:
    found: list[float] = np.nan_to_num(values).tolist()
    return found
