"""A run's plan, computed from what was sampled and measured: tokens, size, capture, training,
and whether it fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from deepspec.config.draft import Eagle3DraftConfig
from deepspec.config.run import RunConfig
from deepspec.plan.arithmetic import (
    Codecs,
    Fit,
    Histogram,
    Number,
    Shape,
    TokenCounts,
    bytes_by_codec,
    hidden_bytes,
    hidden_settings,
    histogram,
    put_requests,
    shard_notes,
    training_flops,
)
from deepspec.plan.source_choice import Effort, SourcesPart, compare_sources, count_passes
from deepspec.storage.s3_client import part_bytes

PER_PROMPTS = 1000  # what is planned for where the number of prompts is not known
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
LONG_HOURS = 24.0


class SampleSize(NamedTuple):
    tokens: int
    supervised: int
    kept_last: int
    uncut_tokens: int


class Workload(NamedTuple):
    """What is to be captured: `prompts` is None where the source does not say how many rows it
    has.
    """

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
    lanes: int
    tokens_per_s: Number  # of one lane
    tokens_per_pass: int
    flops_per_s: Number
    hours: Number  # of the whole cache
    hours_left: Number  # of what is not committed yet
    bytes_per_s: Number  # that all lanes together write
    store_bytes_per_s: Number | None


class TrainingPart(NamedTuple):
    passes: Number
    draft_parameters: Number
    hours: Number
    read_bytes_per_s: Number


class Plan(NamedTuple):
    """Everything that `python -m deepspec plan` says; hours are wall-clock over all lanes,
    bytes are decimal.
    """

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
        return {**_plain(self), "fits": self.fit.fits if self.fit else None}


def compute_plan(config: RunConfig, facts: Facts, *, room: Callable[[float], Fit]) -> Plan:
    """The plan of these facts; `room` says what the store has for so many bytes."""
    tokens, size = token_part(facts.work), size_part(config, facts)
    capture = capture_part(facts, size)
    training = training_part(config, facts, size)
    known = room if facts.work.prompts else None
    sources = compare_sources(config, effort_of(facts, size, capture, training), room=known)
    fit = known(sources.option(sources.chosen).num_bytes) if known else None
    target = "the demo's" if config.demo else config.target.model
    notes = _notes(config, facts, size, capture)
    return Plan(
        config.name,
        target,
        config.store,
        tokens,
        size,
        capture,
        training,
        sources,
        fit,
        tuple(notes),
    )


def effort_of(facts: Facts, size: SizePart, capture: CapturePart, training: TrainingPart) -> Effort:
    return Effort(
        cache_bytes=size.num_bytes.value,
        missing_bytes=size.missing_bytes.value,
        beside_bytes=size.frozen_bytes.value,
        shard_bytes=size.shard_bytes.value,
        num_shards=int(size.shards.value),
        capture_hours=capture.hours.value,
        capture_hours_left=capture.hours_left.value,
        train_hours=training.hours.value,
        passes=training.passes.value,
        lanes=facts.lanes,
        device=facts.speed.device,
    )


def token_part(work: Workload) -> TokenPart:
    counts, sizes, origin = work.counts, work.sizes, work.origin
    cut = [size.uncut_tokens - size.tokens for size in sizes]
    return TokenPart(
        prompts=work.prompts,
        samples=Number(counts.samples, origin),
        tokens=Number(counts.tokens, origin),
        error=work.error,
        supervised=Number(counts.supervised / max(counts.tokens, 1), origin),
        answers=work.answers_from,
        per_sample=histogram([size.tokens for size in sizes]),
        cut_samples=Number(sum(lost > 0 for lost in cut) / max(len(cut), 1), origin),
        cut_tokens=Number(sum(cut) / max(sum(size.uncut_tokens for size in sizes), 1), origin),
    )


def size_part(config: RunConfig, facts: Facts) -> SizePart:
    counts, shape, codecs = facts.work.counts, facts.shape, hidden_settings(config.hidden)
    num_bytes = hidden_bytes(counts, codecs, shape)
    frozen = 2.0 * shape.vocab_size * shape.width * ITEM_BYTES[config.target.dtype]
    prompts = facts.work.prompts.value if facts.work.prompts else PER_PROMPTS
    num_shards = max(1, -(-int(prompts) // config.prompts.shard_rows))
    shard_bytes = num_bytes / prompts * min(prompts, config.prompts.shard_rows) if prompts else 0.0
    origin = (
        facts.work.origin
        if codecs == Codecs("raw", codecs.last and "raw", "none")
        else f"{facts.work.origin}, {codecs} assumed"
    )
    return SizePart(
        codecs=str(codecs),
        bytes_by_codec=bytes_by_codec(counts, codecs, shape),
        num_bytes=Number(num_bytes, origin),
        frozen_bytes=Number(frozen, "exact"),
        missing_bytes=Number(
            facts.missing * num_bytes + (frozen if facts.missing else 0),
            f"{1 - facts.missing:.0%} is committed",
        ),
        shards=Number(num_shards, f"shard_rows {config.prompts.shard_rows}"),
        shard_bytes=Number(shard_bytes, origin),
        puts=Number(
            put_requests(num_shards, shard_bytes=shard_bytes, frozen_bytes=frozen),
            f"parts of {part_bytes(int(shard_bytes)) >> 20} MiB",
        ),
        gets_per_pass=Number(
            round(counts.samples * (1 - config.prompts.held_out)), "one a training sample"
        ),
    )


def capture_part(facts: Facts, size: SizePart) -> CapturePart:
    speed, tokens = facts.speed, facts.work.counts.tokens
    here = f"measured here ({speed.device})"
    hours = tokens / (speed.tokens_per_s * facts.lanes) / 3600
    store = facts.store_bytes_per_s
    return CapturePart(
        lanes=facts.lanes,
        tokens_per_s=Number(speed.tokens_per_s, here),
        tokens_per_pass=speed.num_tokens,
        flops_per_s=Number(speed.flops_per_s, here),
        hours=Number(hours, f"{facts.lanes} lane{'s' if facts.lanes > 1 else ''} at that speed"),
        hours_left=Number(facts.missing * hours, size.missing_bytes.origin),
        bytes_per_s=Number(size.num_bytes.value / max(3600 * hours, 1e-9), "at that speed"),
        store_bytes_per_s=None if store is None else Number(store, "measured here"),
    )


def training_part(config: RunConfig, facts: Facts, size: SizePart) -> TrainingPart:
    """Training as estimated from its FLOPs at the speed of the measurement, or as long as the
    user says.
    """
    kept, counts = 1 - config.prompts.held_out, facts.work.counts
    passes = count_passes(config, kept * counts.samples)
    per_sample = counts.scaled(1 / max(counts.samples, 1))
    if isinstance(config.draft, Eagle3DraftConfig):
        slots, positions = (
            per_sample.supervised * config.draft.ttt_length,
            per_sample.tokens * config.draft.ttt_length,
        )
    else:
        slots = min(config.draft.num_anchors, per_sample.supervised) * config.draft.block_size
        positions = per_sample.tokens + slots
    flops = training_flops(
        counts, facts.shape, trainable=facts.draft_parameters, slots=slots, positions=positions
    )
    estimated = passes.value * kept * flops / (facts.speed.flops_per_s * facts.lanes) / 3600
    hours = estimated if facts.train_hours is None else facts.train_hours
    return TrainingPart(
        passes=passes,
        draft_parameters=Number(facts.draft_parameters, "exact"),
        hours=Number(hours, "assumed from FLOPs" if facts.train_hours is None else "as given"),
        read_bytes_per_s=Number(
            kept * passes.value * size.num_bytes.value / max(3600 * hours, 1e-9),
            "to keep up with that",
        ),
    )


def _notes(config: RunConfig, facts: Facts, size: SizePart, capture: CapturePart) -> list[str]:
    notes = shard_notes(
        int(size.shards.value),
        shard_bytes=size.shard_bytes.value,
        shard_rows=config.prompts.shard_rows,
    )
    if facts.work.prompts is None:
        notes.append(
            "the source does not say how many rows it has: all totals are of 1,000 prompts, and nothing says whether it fits"
        )
    if not facts.work.has_answers and config.target.thinking:
        notes.append(
            "the target thinks: its answers may be much longer than planned; answer a few shards and plan again"
        )
    if facts.speed.device == "cpu" and capture.hours.value > LONG_HOURS:
        notes.append(
            "the hours are those of this machine's CPU: plan again on a machine with the GPU that will capture"
        )
    store = capture.store_bytes_per_s
    if store and store.value < capture.bytes_per_s.value:
        notes.append(
            "the store takes bytes more slowly than the capture makes them: the capture will wait for it"
        )
    return notes


def _plain(value: Any) -> Any:
    """Tuples with names as mappings, all the way down."""
    if hasattr(value, "_asdict"):
        return {key: _plain(part) for key, part in value._asdict().items()}
    return value
