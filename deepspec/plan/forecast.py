"""A run's plan, computed from what was sampled and measured: tokens, requests, FLOPs, hours.

Pure arithmetic; each number carries where it comes from.
"""

import math

from deepspec.config.run import RunConfig
from deepspec.formatting import human_bytes, human_count, human_hours
from deepspec.plan.cache_size import bytes_by_codec, cache_bytes, codecs_name, is_assumed
from deepspec.plan.parts import (
    PER_PROMPTS,
    CapturePart,
    Facts,
    Number,
    Plan,
    SizePart,
    TokenPart,
    TrainingPart,
    Workload,
    histogram,
)
from deepspec.plan.source_choice import compare_sources, fit_of
from deepspec.storage.s3_client import part_bytes

MAX_SHARD_BYTES, MIN_SHARD_BYTES, GOOD_SHARD_BYTES = 4.5e9, 64e6, 2e9
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
LONG_HOURS = 24.0
SHARE = "{:.1%}".format
REQUESTS = "{:,.0f} S3 requests".format


def compute_plan(config: RunConfig, facts: Facts) -> Plan:
    """The plan of these facts."""
    size = _size_part(config, facts)
    capture = _capture_part(facts, size)
    training = _training_part(config, facts, size)
    sources = compare_sources(config, facts, size=size, capture=capture, training=training)
    return Plan(
        run=config.name,
        target="the demo's" if config.demo else config.target.model,
        store=config.store,
        tokens=_token_part(facts.work),
        size=size,
        capture=capture,
        training=training,
        memory=facts.memory,
        sources=sources,
        fit=fit_of(config, facts, sources.option(sources.chosen).num_bytes),
        notes=tuple(_notes(config, facts, size, capture)),
    )


def _token_part(work: Workload) -> TokenPart:
    """The workload as shares and totals."""
    counts, sizes, origin = work.counts, work.sizes, work.origin
    cut = [size.uncut_tokens - size.tokens for size in sizes]
    uncut = sum(size.uncut_tokens for size in sizes)
    return TokenPart(
        prompts=work.prompts,
        samples=Number(counts.samples, origin),
        tokens=Number(counts.tokens, origin, human_count),
        error=work.error,
        supervised=Number(counts.supervised / max(counts.tokens, 1), origin, SHARE),
        answers=work.answers_from,
        per_sample=histogram([size.tokens for size in sizes]),
        cut_samples=Number(sum(lost > 0 for lost in cut) / max(len(cut), 1), origin, SHARE),
        cut_tokens=Number(sum(cut) / max(uncut, 1), origin, SHARE),
    )


def _size_part(config: RunConfig, facts: Facts) -> SizePart:
    """Bytes, shards and requests of the cache."""
    counts, shape, codecs = facts.work.counts, facts.shape, codecs_name(config.hidden)
    num_bytes = cache_bytes(counts, config.hidden, shape)
    frozen = 2.0 * shape.vocab_size * shape.width * ITEM_BYTES[config.target.dtype]
    prompts = PER_PROMPTS if facts.work.prompts is None else facts.work.prompts
    shard_rows = config.prompts.shard_rows
    num_shards = max(1, math.ceil(prompts / shard_rows))
    shard_bytes = num_bytes / prompts * min(prompts, shard_rows) if prompts else 0.0
    missing = facts.missing * num_bytes + (frozen if facts.missing else 0)
    # Of a shard its data, its index rows and its record; once artifact.json, schema, the target's
    # config, index and manifest.
    puts = num_shards * (puts_per_file(shard_bytes) + 2) + puts_per_file(frozen) + 5
    gets = round(counts.samples * (1 - config.prompts.held_out))
    origin = facts.work.origin + (f", {codecs} assumed" if is_assumed(codecs) else "")
    return SizePart(
        codecs=codecs,
        bytes_by_codec=bytes_by_codec(counts, config.hidden, shape),
        num_bytes=Number(num_bytes, origin, human_bytes),
        frozen_bytes=Number(frozen, "exact", human_bytes),
        missing_bytes=Number(missing, f"{1 - facts.missing:.0%} is committed", human_bytes),
        shards=Number(num_shards, f"shard_rows {shard_rows}"),
        shard_bytes=Number(shard_bytes, origin, human_bytes),
        puts=Number(puts, f"parts of {part_bytes(int(shard_bytes)) >> 20} MiB", REQUESTS),
        gets_per_pass=Number(gets, "one a training sample", REQUESTS),
    )


def puts_per_file(num_bytes: float) -> int:
    """Requests that upload one file: one, or its parts and two that open and complete them."""
    parts = math.ceil(num_bytes / part_bytes(math.ceil(num_bytes)))
    return 1 if parts <= 1 else parts + 2


def _capture_part(facts: Facts, size: SizePart) -> CapturePart:
    """The capture at the measured speed."""
    speed, store = facts.speed, facts.store_bytes_per_s
    here = f"measured here ({speed.device})"
    lanes = f"{facts.lanes} lane{'s' if facts.lanes > 1 else ''}"
    hours = facts.work.counts.tokens / (speed.tokens_per_s * facts.lanes) / 3600
    return CapturePart(
        lanes=facts.lanes,
        tokens_per_s=Number(speed.tokens_per_s, here, human_count),
        tokens_per_pass=speed.num_tokens,
        flops_per_s=Number(speed.flops_per_s, here, human_count),
        hours=Number(hours, f"{lanes} at that speed", human_hours),
        hours_left=Number(facts.missing * hours, size.missing_bytes.origin, human_hours),
        bytes_per_s=Number(size.num_bytes / max(3600 * hours, 1e-9), "at that speed", human_bytes),
        store_bytes_per_s=None if store is None else Number(store, "measured here", human_bytes),
    )


def _training_part(config: RunConfig, facts: Facts, size: SizePart) -> TrainingPart:
    """The training at the measured FLOPs, or in the hours that were given.

    FLOPs are 6 per trainable parameter and position, and per lm_head weight and slot. Rather too
    many: context tokens go through only a part of a block draft. The lm_head is frozen: two for the
    draft's forward pass, two back to its input, two for the target's own distribution.
    """
    draft, train, counts = config.draft, config.train, facts.work.counts
    trained = 1 - config.prompts.held_out
    passes = Number(train.epochs, "train.epochs", "{:.3g}".format)
    if train.max_steps is not None:
        by_steps = train.max_steps * train.global_batch / max(trained * counts.samples, 1)
        passes = min(passes, Number(by_steps, "train.max_steps", "{:.3g}".format))
    per_sample = counts.scaled(1 / max(counts.samples, 1))
    if draft.algorithm == "eagle3":
        slots = per_sample.supervised * draft.ttt_length
        positions = per_sample.tokens * draft.ttt_length
    else:
        blocks = min(draft.num_anchors, per_sample.supervised)
        slots = blocks * draft.block_size
        positions = per_sample.tokens + blocks * draft.num_queries
    head = facts.shape.vocab_size * facts.shape.width
    flops = 6.0 * (facts.draft_parameters * positions + head * slots) * counts.samples
    share = passes * trained  # of the cache, that is read
    hours, origin = facts.train_hours, "as given"
    if hours is None:
        hours = share * flops / (facts.speed.flops_per_s * facts.lanes) / 3600
        origin = "assumed from FLOPs"
    read = share * size.num_bytes / max(3600 * hours, 1e-9)
    return TrainingPart(
        passes=passes,
        draft_parameters=Number(facts.draft_parameters, "exact", human_count),
        hours=Number(hours, origin, human_hours),
        read_bytes_per_s=Number(read, "to keep up with that", human_bytes),
    )


def _notes(config: RunConfig, facts: Facts, size: SizePart, capture: CapturePart) -> list[str]:
    """What a reader should know or change."""
    shard, store = size.shard_bytes, capture.store_bytes_per_s
    rows = max(1, int(config.prompts.shard_rows * GOOD_SHARD_BYTES / max(shard, 1)))
    rows -= rows % 8 if rows >= 8 else 0
    advice = f"set prompts.shard_rows to about {rows}"
    notes = [
        (
            shard > MAX_SHARD_BYTES,
            f"a shard takes {human_bytes(shard)}, too much for one upload and one spool disk; "
            f"{advice}",
        ),
        (
            shard < MIN_SHARD_BYTES and size.shards * shard > GOOD_SHARD_BYTES,
            f"a shard takes only {human_bytes(shard)}: {advice} for fewer files and requests",
        ),
        (
            facts.work.prompts is None,
            "how many rows the source has is not known: all totals are of 1,000 prompts, and "
            "whether it fits is not known",
        ),
        (
            config.target.thinking and not facts.work.has_answers,
            "the target thinks: its answers may be much longer than planned; answer a few shards "
            "and plan again",
        ),
        (
            facts.speed.device == "cpu" and capture.hours > LONG_HOURS,
            "the hours are those of this machine's CPU: plan again on a machine with the GPU that "
            "will capture",
        ),
        (
            store is not None and store < capture.bytes_per_s,
            "the store takes bytes more slowly than the capture makes them: the capture will wait "
            "for it",
        ),
    ]
    return [note for applies, note in notes if applies]
