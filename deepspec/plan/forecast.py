"""A run's plan, computed from what was sampled and measured."""

from collections.abc import Callable

from deepspec.config.draft import DraftConfig
from deepspec.config.run import RunConfig
from deepspec.plan.arithmetic import (
    Fit,
    Number,
    histogram,
    put_requests,
    shard_notes,
    training_flops,
)
from deepspec.plan.cache_size import bytes_by_codec, cache_bytes, codecs_name, is_assumed
from deepspec.plan.parts import (
    PER_PROMPTS,
    CapturePart,
    Facts,
    Plan,
    SizePart,
    TokenPart,
    TrainingPart,
    Workload,
)
from deepspec.plan.source_choice import Effort, compare_sources, count_passes
from deepspec.storage.s3_client import part_bytes

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
LONG_HOURS = 24.0


def compute_plan(config: RunConfig, facts: Facts, *, room: Callable[[float], Fit]) -> Plan:
    """The plan of these facts; `room` returns what the store has for so many bytes."""
    tokens, size = token_part(facts.work), size_part(config, facts)
    capture = capture_part(facts, size)
    passes = count_passes(config.train, (1 - config.prompts.held_out) * tokens.samples.value)
    share = passes.value * (1 - config.prompts.held_out)
    training = training_part(config.draft, facts, size, passes=passes, share=share)
    known = room if facts.work.prompts else None
    sources = compare_sources(
        effort_of(facts, size, capture, training),
        config.train,
        config.resources.training,
        held_out=config.prompts.held_out,
        room=known,
    )
    notes = shard_notes(
        int(size.shards.value),
        shard_bytes=size.shard_bytes.value,
        shard_rows=config.prompts.shard_rows,
    )
    return Plan(
        run=config.name,
        target="the demo's" if config.demo else config.target.model,
        store=config.store,
        tokens=tokens,
        size=size,
        capture=capture,
        training=training,
        sources=sources,
        fit=known(sources.option(sources.chosen).num_bytes) if known else None,
        notes=(*notes, *_notes(facts, capture, thinking=config.target.thinking)),
    )


def effort_of(facts: Facts, size: SizePart, capture: CapturePart, training: TrainingPart) -> Effort:
    """The numbers by which the sources of hidden states are compared."""
    return Effort(
        cache_bytes=size.num_bytes.value,
        missing_bytes=size.missing_bytes.value,
        once_bytes=size.frozen_bytes.value,
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
    """The workload as shares and totals."""
    counts, sizes, origin = work.counts, work.sizes, work.origin
    cut = [size.uncut_tokens - size.tokens for size in sizes]
    uncut = sum(size.uncut_tokens for size in sizes)
    return TokenPart(
        prompts=work.prompts,
        samples=Number(counts.samples, origin),
        tokens=Number(counts.tokens, origin),
        error=work.error,
        supervised=Number(counts.supervised / max(counts.tokens, 1), origin),
        answers=work.answers_from,
        per_sample=histogram([size.tokens for size in sizes]),
        cut_samples=Number(sum(lost > 0 for lost in cut) / max(len(cut), 1), origin),
        cut_tokens=Number(sum(cut) / max(uncut, 1), origin),
    )


def size_part(config: RunConfig, facts: Facts) -> SizePart:
    """Bytes, shards and requests of the cache."""
    counts, shape, codecs = facts.work.counts, facts.shape, codecs_name(config.hidden)
    num_bytes = cache_bytes(counts, config.hidden, shape)
    frozen = 2.0 * shape.vocab_size * shape.width * ITEM_BYTES[config.target.dtype]
    prompts = facts.work.prompts.value if facts.work.prompts else PER_PROMPTS
    shard_rows = config.prompts.shard_rows
    num_shards = max(1, -(-int(prompts) // shard_rows))
    shard_bytes = num_bytes / prompts * min(prompts, shard_rows) if prompts else 0.0
    missing = facts.missing * num_bytes + (frozen if facts.missing else 0)
    puts = put_requests(num_shards, shard_bytes=shard_bytes, frozen_bytes=frozen)
    origin = facts.work.origin + (f", {codecs} assumed" if is_assumed(codecs) else "")
    return SizePart(
        codecs=codecs,
        bytes_by_codec=bytes_by_codec(counts, config.hidden, shape),
        num_bytes=Number(num_bytes, origin),
        frozen_bytes=Number(frozen, "exact"),
        missing_bytes=Number(missing, f"{1 - facts.missing:.0%} is committed"),
        shards=Number(num_shards, f"shard_rows {shard_rows}"),
        shard_bytes=Number(shard_bytes, origin),
        puts=Number(puts, f"parts of {part_bytes(int(shard_bytes)) >> 20} MiB"),
        gets_per_pass=Number(
            round(counts.samples * (1 - config.prompts.held_out)), "one a training sample"
        ),
    )


def capture_part(facts: Facts, size: SizePart) -> CapturePart:
    """The capture at the measured speed."""
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


def training_part(
    draft: DraftConfig, facts: Facts, size: SizePart, *, passes: Number, share: float
) -> TrainingPart:
    """The training at the measured FLOPs, or in the hours that were given.

    `share` of the cache is read: the passes over what is not held out.
    """
    counts = facts.work.counts
    per_sample = counts.scaled(1 / max(counts.samples, 1))
    if draft.algorithm == "eagle3":
        slots = per_sample.supervised * draft.ttt_length
        positions = per_sample.tokens * draft.ttt_length
    else:
        slots = min(draft.num_anchors, per_sample.supervised) * draft.block_size
        positions = per_sample.tokens + slots
    flops = training_flops(
        counts, facts.shape, trainable=facts.draft_parameters, slots=slots, positions=positions
    )
    hours, origin = facts.train_hours, "as given"
    if hours is None:
        hours = share * flops / (facts.speed.flops_per_s * facts.lanes) / 3600
        origin = "assumed from FLOPs"
    read = share * size.num_bytes.value / max(3600 * hours, 1e-9)
    return TrainingPart(
        passes=passes,
        draft_parameters=Number(facts.draft_parameters, "exact"),
        hours=Number(hours, origin),
        read_bytes_per_s=Number(read, "to keep up with that"),
    )


def _notes(facts: Facts, capture: CapturePart, *, thinking: bool) -> list[str]:
    notes = []
    if facts.work.prompts is None:
        notes.append(
            "the source does not say how many rows it has: all totals are of 1,000 prompts, and "
            "whether it fits is not known"
        )
    if not facts.work.has_answers and thinking:
        notes.append(
            "the target thinks: its answers may be much longer than planned; answer a few shards "
            "and plan again"
        )
    if facts.speed.device == "cpu" and capture.hours.value > LONG_HOURS:
        notes.append(
            "the hours are those of this machine's CPU: plan again on a machine with the GPU that "
            "will capture"
        )
    store = capture.store_bytes_per_s
    if store and store.value < capture.bytes_per_s.value:
        notes.append(
            "the store takes bytes more slowly than the capture makes them: the capture will wait "
            "for it"
        )
    return notes
