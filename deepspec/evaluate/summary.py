"""The summary of a result's rows per benchmark, domain and temperature, with 95 % intervals.

Acceptance is that of the first batch size alone, since it does not depend on it; speed is that of
each batch size; losslessness is that of the answers at all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

from deepspec.artifacts.results import (
    BatchSpeed,
    BenchmarkMetrics,
    DomainMetrics,
    EvaluationSummary,
    Interval,
    Losslessness,
    MeanIntervals,
    MeanMetrics,
    MetricIntervals,
    Metrics,
    OverallMetrics,
    PhaseSeconds,
    TokensPerSecond,
)
from deepspec.evaluate.counts import (
    Array,
    Resampled,
    Rows,
    Sums,
    add_up,
    drawn_by,
    interval,
    intervals,
    mean_of,
    number,
    pool,
    quantile,
    resample,
)

GAP_BOUND = 0.5
"""Logits of 16 to 32 come in steps of 0.125 in bfloat16; rounding may turn a near tie around."""
GAP_SHARE = 0.95
"""Of the answers that differ, so many do it within the bound; all of them where they are fewer than
20. Over thousands of answers, rounding adds up to more than the bound in one or the other."""
T = TypeVar("T")


class Part(NamedTuple):
    """One benchmark at one temperature."""

    benchmark: str
    domain: str
    rows: Rows  # of the first batch size
    answers: Rows  # of all batch sizes
    rounds: Resampled  # of the first batch size, by prompt
    by_size: dict[int, Resampled]  # by groups that were decoded together


def summarise(rows: Rows, *, dtype: str | None = None) -> EvaluationSummary:
    """The summary of rows of any number of benchmarks, temperatures and batch sizes.

    There is at least one row. `dtype` is the number format that both ways of decoding computed in;
    None where it is not known.
    """
    positions = max((proposed for row in rows for proposed in row["proposed"]), default=0)
    benchmarks, overall = list[BenchmarkMetrics](), dict[float, OverallMetrics]()
    for temperature, at_this in grouped(rows, itemgetter("temperature")).items():
        parts = [
            _part(name, temperature, answers, positions)
            for name, answers in grouped(at_this, itemgetter("benchmark")).items()
        ]
        overall[temperature] = _overall(parts, temperature, dtype)
        benchmarks += [
            BenchmarkMetrics(
                **dict(_metrics([part], temperature, dtype)),
                benchmark=part.benchmark,
                domain=part.domain,
                temperature=temperature,
            )
            for part in parts
        ]
    first = next(iter(overall))
    return EvaluationSummary(
        **dict(overall[first]), temperature=first, temperatures=overall, benchmarks=benchmarks
    )


def grouped(rows: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Rows by their key, in order of appearance."""
    groups: dict[Any, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _part(name: str, temperature: float, answers: Rows, positions: int) -> Part:
    by_size = grouped(answers, itemgetter("batch_size"))
    # A prompt for which a batch size did not fit into memory was decoded at a smaller one.
    first = dict[tuple[int, int], int]()
    for row in answers:
        first.setdefault((row["prompt"], row["turn"]), row["batch_size"])
    rows = [row for row in answers if row["batch_size"] == first[row["prompt"], row["turn"]]]
    prompts = grouped(rows, itemgetter(drawn_by(rows))).values()
    rounds = resample(add_up(prompts, positions), key=(name, temperature))
    times = {
        size: resample(
            add_up(grouped(of_size, itemgetter("group")).values()), key=(name, temperature, size)
        )
        for size, of_size in by_size.items()
    }
    return Part(name, rows[0]["domain"], rows, answers, rounds, times)


def _overall(parts: Sequence[Part], temperature: float, dtype: str | None) -> OverallMetrics:
    micro, macro = _metrics(parts, temperature, dtype), _macro(parts)
    lengths = {part.benchmark: number(part.rounds.sums.acceptance_length()) for part in parts}
    domains = [
        DomainMetrics(
            **dict(_metrics(of_domain, temperature, dtype)),
            domain=domain,
            benchmarks=[part.benchmark for part in of_domain],
        )
        for domain, of_domain in grouped(parts, lambda part: part.domain).items()
    ]
    pooled = {**dict(micro), "acceptance_length": {"macro": macro.acceptance_length, **lengths}}
    return OverallMetrics(**pooled, micro=micro, macro=macro, domains=domains)


def _macro(parts: Sequence[Part]) -> MeanMetrics:
    rounds = [part.rounds for part in parts]
    times = [next(iter(part.by_size.values())) for part in parts]
    measured = {
        "acceptance_length": _mean(rounds, Sums.acceptance_length),
        "verify_rate": _mean(rounds, Sums.verify_rate),
        "speedup": _mean(times, Sums.speedup),
    }
    return MeanMetrics(
        benchmarks=len(parts),
        intervals=MeanIntervals(**{name: known for name, (_, known) in measured.items()}),
        **{name: mean for name, (mean, _) in measured.items()},
    )


def _mean(
    parts: Sequence[Resampled], measure: Callable[[Sums], Array]
) -> tuple[float, Interval | None]:
    values = mean_of([measure(part.sums) for part in parts])
    return number(values), interval(values) if any(part.varies for part in parts) else None


def _metrics(parts: Sequence[Part], temperature: float, dtype: str | None) -> Metrics:
    """All metrics of some benchmarks' prompts taken together."""
    rounds = pool([part.rounds for part in parts])
    sums = rounds.sums
    length, rate = sums.acceptance_length(), sums.verify_rate()
    prefix, conditional = sums.prefix_acceptance(), sums.conditional_acceptance()
    rows = [row for part in parts for row in part.rows]
    answers = [row for part in parts for row in part.answers]
    speeds = [
        _batch_speed(size, of_size, parts)
        for size, of_size in grouped(answers, itemgetter("batch_size")).items()
    ]
    first = speeds[0]
    lossless = losslessness(answers, temperature, dtype)
    return Metrics(
        prompts=_num_prompts(rows),
        rounds=number(sums.rounds),
        tokens=sum(row["num_tokens"] for row in rows),
        acceptance_length=number(length),
        prefix_acceptance=number(prefix),
        conditional_acceptance=number(conditional),
        reached=number(sums.reached),
        tried=number(sums.tried),
        verify_rate=number(rate),
        tokens_per_s=first.tokens_per_s,
        speedup=first.speedup,
        seconds=first.seconds,
        intervals=MetricIntervals(
            acceptance_length=rounds.interval(length),
            verify_rate=rounds.interval(rate),
            speedup=first.interval,
            prefix_acceptance=intervals(prefix),
            conditional_acceptance=intervals(conditional),
        ),
        batch_sizes=speeds,
        lossless=(lossless.identical, lossless.prompts),
        losslessness=lossless,
    )


def _num_prompts(rows: Rows) -> int:
    return len({(row["benchmark"], row["prompt"]) for row in rows})


def _batch_speed(size: int, rows: Rows, parts: Sequence[Part]) -> BatchSpeed:
    times = pool([part.by_size[size] for part in parts if size in part.by_size])
    speedup = times.sums.speedup()
    totals = {name: number(sums) for name, sums in times.sums._asdict().items()}
    bookkeeping = totals["seconds"] - totals["draft_seconds"] - totals["verify_seconds"]
    return BatchSpeed(
        batch_size=size,
        groups=times.num_units,
        prompts=_num_prompts(rows),
        tokens_per_s=TokensPerSecond(
            plain=number(times.sums.plain_tokens_per_s()),
            speculative=number(times.sums.tokens_per_s()),
        ),
        speedup=number(speedup),
        interval=times.interval(speedup),
        seconds=PhaseSeconds(**totals, bookkeeping_seconds=bookkeeping),
    )


def losslessness(rows: Rows, temperature: float, dtype: str | None) -> Losslessness:
    """What is known of whether the output is the target's; `ok` is None where these counts cannot
    show it.
    """
    prompts = len(rows)
    identical = sum(bool(row["identical"]) for row in rows)
    gaps = [row["regret"] for row in rows if row.get("regret") is not None]
    largest, usual = max(gaps, default=None), quantile(gaps, GAP_SHARE)
    differ = f"{prompts - identical} of {prompts} answers differ from plain greedy decoding"
    bound: float | None = GAP_BOUND
    if temperature > 0:
        ok, bound, why = None, None, "which verification ensures; two draws need not be equal"
        words = f"sampled answers are distributed as the target's, {why}"
    elif identical == prompts:
        ok, bound = True, None
        words = "every answer is token for token that of plain greedy decoding"
    elif dtype == "float32":
        ok, bound, words = False, 0.0, f"{differ}: in float32 none may"
    elif usual is None or len(gaps) < prompts - identical:
        ok, words = None, f"{differ}, and how near those ties were was not recorded"
    else:
        ok = usual <= GAP_BOUND
        gap = f"{GAP_SHARE:.0%} first differ in tokens at most {usual:.3g} apart in their logits"
        words = f"{differ}, by {'ties' if ok else 'more than ties'}: {gap} (bound {GAP_BOUND:g})"
    return Losslessness(
        dtype=dtype,
        identical=identical,
        prompts=prompts,
        max_logit_gap=largest,
        usual_logit_gap=usual,
        bound=bound,
        ok=ok,
        words=words,
    )
