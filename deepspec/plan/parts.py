"""What a plan is made from, and what it consists of; bytes are decimal."""

from typing import Any, NamedTuple

from deepspec.plan.arithmetic import Fit, Histogram, Number, Shape, TokenCounts
from deepspec.plan.source_choice import SourcesPart

PER_PROMPTS = 1000  # what is planned for where the number of prompts is not known


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


class Speed(NamedTuple):
    """Of one lane, capturing: forward passes alone, without reading answers or writing states."""

    tokens_per_s: float
    flops_per_s: float  # of the matrices in the decoder layers
    device: str
    num_tokens: int  # in each timed pass


class Facts(NamedTuple):
    """What is known before anything is computed."""

    work: Workload
    shape: Shape
    draft_parameters: int
    speed: Speed
    lanes: int
    store_bytes_per_s: float | None  # None: not measured
    missing: float  # share of the cache that is not committed yet
    train_hours: float | None  # None: to be estimated


class TokenPart(NamedTuple):
    """Samples and their tokens."""

    prompts: Number | None
    samples: Number
    tokens: Number
    error: float
    supervised: Number  # share of the tokens
    answers: str
    per_sample: Histogram
    cut_samples: Number  # share of the samples longer than hidden.max_length
    cut_tokens: Number  # share of the tokens beyond it


class SizePart(NamedTuple):
    """What the cache puts into the store."""

    codecs: str
    bytes_by_codec: dict[str, float]
    num_bytes: Number  # in these codecs
    frozen_bytes: Number
    missing_bytes: Number
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


class Plan(NamedTuple):
    """The whole plan; hours are wall-clock over all lanes."""

    run: str
    target: str
    store: str
    tokens: TokenPart
    size: SizePart
    capture: CapturePart
    training: TrainingPart
    sources: SourcesPart
    # of the source that the run has chosen; None where the size of the whole is not known
    fit: Fit | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Every number with its origin."""
        return {**_plain(self), "fits": self.fit.fits if self.fit else None}


def _plain(value: Any) -> Any:
    """Tuples with names as mappings, all the way down."""
    if hasattr(value, "_asdict"):
        return {key: _plain(part) for key, part in value._asdict().items()}
    return value
