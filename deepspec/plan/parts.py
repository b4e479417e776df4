"""What a plan is made from, and what it consists of; bytes are decimal, hours are wall-clock over
all lanes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np

PER_PROMPTS = 1000  # what is planned for where the number of prompts is not known
HISTOGRAM_BINS = 32
SourceName = Literal["cache", "rolling", "online"]


class Number(float):
    """A value and how it is known: exact, from a sample, measured here, or assumed.

    `show` writes it for people.
    """

    origin: str
    show: Callable[[float], str]

    def __new__(
        cls, value: float, origin: str, show: Callable[[float], str] = "{:,.0f}".format
    ) -> Self:
        """The value with its origin."""
        number = super().__new__(cls, value)
        number.origin, number.show = origin, show
        return number


class TokenCounts(NamedTuple):
    """Of all samples together; `kept_last` positions keep their final hidden state."""

    samples: float
    tokens: float
    supervised: float
    kept_last: float

    def scaled(self, factor: float) -> "TokenCounts":
        """The counts of so many times the samples."""
        return TokenCounts(*(factor * count for count in self))


class SampleSize(NamedTuple):
    """Tokens of one training sample; `uncut_tokens` are those before `hidden.max_length`."""

    tokens: int
    supervised: int
    kept_last: int
    uncut_tokens: int


class Workload(NamedTuple):
    """What is to be captured; `prompts` is None where the source has no known length."""

    prompts: Number | None
    counts: TokenCounts  # of all prompts, or of PER_PROMPTS of them
    origin: str
    answers_from: str
    has_answers: bool  # of the target, at least in part
    error: float  # half the 95 % interval of the tokens, relative
    sizes: tuple[SampleSize, ...]


class Shape(NamedTuple):
    """What of a target decides the size of its cache."""

    num_captured: int
    width: int
    vocab_size: int


class Speed(NamedTuple):
    """Of one lane, capturing: forward passes alone, without reading answers or writing states."""

    tokens_per_s: float
    flops_per_s: float  # of the matrices in the decoder layers
    device: str
    num_tokens: int  # in each timed pass


class MemoryPart(NamedTuple):
    """Bytes that each stage takes of every GPU at most, by arithmetic."""

    gpu: Number
    usable: Number
    answers: Number | None  # None where servers answer
    capture: Number
    training: Number
    evaluation: Number
    training_fits: str  # with these settings


class Facts(NamedTuple):
    """What is known before anything is computed."""

    work: Workload
    shape: Shape
    draft_parameters: int
    speed: Speed
    lanes: int
    store_bytes_per_s: float | None  # None: not measured
    free_bytes: float | None  # None: a store without a known limit
    missing: float  # share of the cache that is not committed yet
    train_hours: float | None  # None: to be estimated
    memory: MemoryPart | None = None  # None: no GPU to plan for


class Histogram(NamedTuple):
    """Lengths of samples, in tokens."""

    p5: int
    p50: int
    p95: int
    max: int
    bins: tuple[int, ...]  # of equal width from 0 to max


class TokenPart(NamedTuple):
    """Samples and their tokens."""

    prompts: Number | None
    answers: str
    samples: Number
    tokens: Number
    error: float  # half the 95 % interval of the tokens, relative
    per_sample: Histogram
    supervised: Number  # share of the tokens
    cut_samples: Number  # share of the samples longer than hidden.max_length
    cut_tokens: Number  # share of the tokens beyond it


class SizePart(NamedTuple):
    """What the cache puts into the store."""

    codecs: str
    bytes_by_codec: dict[str, float]
    num_bytes: Number  # in these codecs
    frozen_bytes: Number  # of the embedding and lm_head
    missing_bytes: Number  # of what is not committed yet, with the embedding and lm_head
    shards: Number
    shard_bytes: Number
    puts: Number
    gets_per_pass: Number


class CapturePart(NamedTuple):
    """How long the capture takes."""

    lanes: int
    tokens_per_s: Number  # of one lane
    tokens_per_pass: int
    flops_per_s: Number
    hours: Number  # of the whole cache
    hours_left: Number  # of what is not committed yet
    bytes_per_s: Number  # that all lanes together write
    store_bytes_per_s: Number | None


class TrainingPart(NamedTuple):
    """How long the training takes, and what it reads."""

    passes: Number
    draft_parameters: Number
    hours: Number
    read_bytes_per_s: Number


class SourceOption(NamedTuple):
    """What one source of hidden states takes; GPU hours are of all GPUs together."""

    name: SourceName
    num_bytes: float  # on the disk at most
    captures: float  # passes of the target over the samples
    capture_gpu_hours: float
    hours: float  # until the draft is trained
    fits: bool | None  # None where the size of the whole is not known


class SourcesPart(NamedTuple):
    """The sources compared, the one that the run has, and the cheapest."""

    options: tuple[SourceOption, ...]
    chosen: SourceName
    best: SourceName
    reason: str

    def option(self, name: SourceName) -> SourceOption:
        """One of the sources by its name."""
        return next(option for option in self.options if option.name == name)


class Fit(NamedTuple):
    """What must still be written, and the room for it; None is a store without a known limit."""

    needed_bytes: float
    free_bytes: float | None
    reserve_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the reserve is still free afterwards."""
        return self.free_bytes is None or self.needed_bytes + self.reserve_bytes <= self.free_bytes


class Plan(NamedTuple):
    """The whole plan."""

    run: str
    target: str
    store: str
    tokens: TokenPart
    size: SizePart
    capture: CapturePart
    training: TrainingPart
    memory: MemoryPart | None  # None where there is no GPU to plan for
    sources: SourcesPart
    # of the source that the run has chosen; None where the size of the whole is not known
    fit: Fit | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Every number with its origin."""
        return {**_plain(self), "fits": self.fit.fits if self.fit else None}


def _plain(value: Any) -> Any:
    """Tuples with names as mappings, all the way down."""
    if isinstance(value, Number):
        return {"value": float(value), "origin": value.origin}
    if hasattr(value, "_asdict"):
        return {key: _plain(part) for key, part in value._asdict().items()}
    return value


def histogram(lengths: Sequence[int]) -> Histogram:
    """Quantiles of the lengths (none: all zeros) and their distribution."""
    longest = max(lengths, default=0)
    bins, _ = np.histogram(lengths, HISTOGRAM_BINS, (0, max(longest, 1)))
    p5, p50, p95 = np.quantile(lengths or [0], (0.05, 0.5, 0.95), method="higher").tolist()
    return Histogram(p5, p50, p95, longest, tuple(bins.tolist()))
