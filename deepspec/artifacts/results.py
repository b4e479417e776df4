"""What an evaluation found: the document `summary.json`, written and read by these models.

A part that an evaluation does not have (calibration, scheduler) has no key in the document; None
in any other place is a number that the counts do not give.
"""

from typing import Any

from pydantic import ConfigDict, Field

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Stored

Interval = tuple[float, float]
"""95 % of the bootstrap's resamples lie between these two."""


class TokensPerSecond(Stored):
    """New tokens per second of wall-clock, both ways of decoding."""

    plain: float
    speculative: float


class PhaseSeconds(Stored):
    """Wall-clock of plain decoding, of speculative decoding (`seconds`), and of its phases."""

    plain_seconds: float
    seconds: float
    draft_seconds: float
    verify_seconds: float
    bookkeeping_seconds: float


class BatchSpeed(Stored):
    """Speed at one batch size; the interval is that of the speed-up."""

    batch_size: int
    groups: int
    prompts: int
    tokens_per_s: TokensPerSecond
    speedup: float
    interval: Interval | None
    seconds: PhaseSeconds


class Losslessness(Stored):
    """Whether the output is the target's own; `ok` is None where the counts cannot show it."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    dtype: str | None
    identical: int
    prompts: int
    max_logit_gap: float | None = Field(alias="max_regret")
    """Largest distance of the two logits where a greedy answer first differs from the plain one;
    in older results that of any emitted token's logit from the largest."""
    usual_logit_gap: float | None = None
    """What 95 % of them do not exceed, which is judged; None in older results."""
    bound: float | None
    ok: bool | None
    words: str


class MeanIntervals(Stored):
    """Intervals of the numbers that have a mean over benchmarks."""

    acceptance_length: Interval | None
    verify_rate: Interval | None
    speedup: Interval | None


class MetricIntervals(MeanIntervals):
    """Intervals of every metric, at position k for those that have one at each."""

    prefix_acceptance: list[Interval | None]
    conditional_acceptance: list[Interval | None]


class MeanMetrics(Stored):
    """Means over benchmarks, each counting the same however many prompts it has (macro)."""

    benchmarks: int
    acceptance_length: float
    verify_rate: float
    speedup: float
    intervals: MeanIntervals


class PooledMetrics(Stored):
    """Metrics over all rounds of some prompts, apart from the acceptance length.

    Acceptance, `speedup`, `tokens_per_s` and `seconds` are those of the first batch size;
    losslessness covers the answers at all of them.
    """

    prompts: int
    rounds: int
    tokens: int
    prefix_acceptance: list[float]
    conditional_acceptance: list[float]
    reached: list[int]
    tried: list[int]
    verify_rate: float
    tokens_per_s: TokensPerSecond
    speedup: float
    seconds: PhaseSeconds
    intervals: MetricIntervals
    batch_sizes: list[BatchSpeed]
    lossless: tuple[int, int]
    """Answers identical to those of plain decoding, of how many."""
    losslessness: Losslessness


class Metrics(PooledMetrics):
    """All metrics over the rounds of some prompts."""

    acceptance_length: float


class BenchmarkMetrics(Metrics):
    """One benchmark at one temperature."""

    benchmark: str
    domain: str
    temperature: float


class DomainMetrics(Metrics):
    """The benchmarks of one domain, pooled."""

    domain: str
    benchmarks: list[str]


class OverallMetrics(PooledMetrics):
    """All benchmarks of one temperature: pooled (micro, whose metrics are also this object's
    own), averaged (macro) and by domain.
    """

    acceptance_length: dict[str, float]
    """By benchmark, and their mean as `macro`."""
    micro: Metrics
    macro: MeanMetrics
    domains: list[DomainMetrics]


class ReliabilityBin(Stored):
    """Tokens whose confidence lies in [low, high): how many, and the share accepted."""

    low: float
    high: float
    count: int
    confidence: float | None
    accepted: float | None


class ConfidenceMeasures(Stored):
    """How well confidences fit what was accepted; None where nothing was measured."""

    ece: float | None
    auroc: float | None
    brier: float | None
    count: int
    bins: list[ReliabilityBin]


class PositionCalibration(Stored):
    """One position of the block (from 1), before and after temperature scaling."""

    position: int
    before: ConfidenceMeasures
    after: ConfidenceMeasures


class ThresholdPoint(Stored):
    """What cutting blocks at the first confidence below a threshold would have given."""

    threshold: float
    acceptance_length: float
    verify_rate: float
    proposed_per_round: float


class RoundCounts(Stored):
    """How much something was computed from."""

    rounds: int
    prompts: int


class CalibrationSummary(Stored):
    """The draft's confidence on the prompts that its temperatures were not fitted on."""

    positions: list[PositionCalibration]
    cumulative: list[PositionCalibration]
    """Of the product of confidences up to each position."""
    temperatures: list[float]
    thresholds: list[ThresholdPoint]
    fitted_on: RoundCounts
    reported_on: RoundCounts


class CurvePoints(Stored):
    """Forward passes of the target per second at so many tokens, as measured."""

    tokens: list[int]
    steps_per_second: list[float]


class SimulatedServing(Stored):
    """One policy at one number of concurrent requests, simulated."""

    requests: int
    throughput: float  # tokens per second, all requests together
    per_user: float  # tokens per second of one request
    verified_per_round: float  # draft tokens verified, the anchor not counted
    lengths: list[float]  # [g + 1] share of rounds in which so many were verified


class SchedulerSummary(Stored):
    """Every verification policy, simulated on recorded rounds."""

    requests: list[int]
    policies: dict[str, list[SimulatedServing]]
    curve: CurvePoints


class EvaluationSummary(OverallMetrics):
    """The whole result; its own metrics are those of the first temperature."""

    temperature: float
    temperatures: dict[float, OverallMetrics]
    benchmarks: list[BenchmarkMetrics]
    calibration: CalibrationSummary | None = None
    scheduler: SchedulerSummary | None = None

    def to_json(self) -> dict[str, Any]:
        """The document as JSON values, without keys for absent parts."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def read_summary(artifact: Artifact) -> EvaluationSummary | None:
    """The summary of a sealed evaluation; None where it is not finished."""
    return artifact.document("summary.json", EvaluationSummary)
