"""What a run will take, before it starts: tokens, bytes, requests, hours, and whether the store can
hold it.

Pure arithmetic on numbers that somebody else read or measured (`data/lengths.py`,
`data/measure.py`); each number carries where it comes from. m captured layers, D hidden size. All
units are decimal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from deepspec.config.data import HiddenConfig
from deepspec.errors import StoreError
from deepspec.formatting import human_bytes
from deepspec.storage.s3_client import part_bytes
from deepspec.storage.store import Store

Codec = Literal["raw", "lossless", "int8", "fp8"]
Compression = Literal["none", "zstd"]
CODECS: tuple[Codec, ...] = ("raw", "lossless", "int8", "fp8")
# Assumptions, from measurements on synthetic and small real models; a real target's states are
# known once it is captured.
LOSSLESS_RATIO = 1.45  # bfloat16 split in byte planes, the high one compressed
# of codes; the others have none
ZSTD_FACTOR: dict[Codec, float] = {"raw": 1.0, "lossless": 1.0, "int8": 0.945, "fp8": 0.86}
TOKEN_BYTES = 4 + 1  # its id, and whether it is supervised
SAMPLE_BYTES = 720 + 60  # the Arrow message's frame, and the row in the index
MAX_SHARD_BYTES, MIN_SHARD_BYTES, GOOD_SHARD_BYTES = 4.5e9, 64e6, 2e9
HISTOGRAM_BINS = 32


class Number(NamedTuple):
    """A value and how it is known: exact, from a sample, measured here, or assumed."""

    value: float
    origin: str


class Codecs(NamedTuple):
    """How a cache is encoded; `last` is None where the final hidden state is not kept."""

    context: Codec
    last: Codec | None
    compression: Compression

    def __str__(self) -> str:
        last = "" if self.last in (None, self.context) else f", last {self.last}"
        return f"{self.context}{last}{'' if self.compression == 'none' else ' + zstd'}"


class TokenCounts(NamedTuple):
    """Of all samples together; `kept_last` positions keep their final hidden state."""

    samples: float
    tokens: float
    supervised: float
    kept_last: float

    def scaled(self, factor: float) -> TokenCounts:
        return TokenCounts(*(factor * count for count in self))


class Shape(NamedTuple):
    """What of a target decides the size of its cache."""

    num_captured: int
    width: int
    vocab_size: int


class Histogram(NamedTuple):
    p5: int
    p50: int
    p95: int
    max: int
    bins: tuple[int, ...]  # of equal width from 0 to max


class Fit(NamedTuple):
    """What must still be written, and the room for it; None is a store without a known limit."""

    needed_bytes: float
    free_bytes: float | None
    reserve_bytes: float

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.needed_bytes + self.reserve_bytes <= self.free_bytes


def choose_codecs(
    codec: Codec, last_codec: Codec | None, compression: Compression, *, last_hidden: str
) -> Codecs:
    """The codecs that these settings mean: the last state follows the others, but never into
    fp8 by itself.
    """
    followed: Codec = "int8" if codec == "fp8" else codec
    return Codecs(codec, None if last_hidden == "none" else last_codec or followed, compression)


def hidden_settings(settings: HiddenConfig) -> Codecs:
    """The codecs of a run; the one place that knows how the configuration spells them."""
    return choose_codecs(
        settings.codec, settings.last_codec, settings.compression, last_hidden=settings.last_hidden
    )


def layer_bytes(codec: Codec, width: int, *, compression: Compression = "none") -> float:
    """Bytes of one token's hidden state of one layer."""
    group = max(size for size in range(1, min(width, 128) + 1) if width % size == 0)
    plain = {
        "raw": 2.0 * width,
        "lossless": 2.0 * width / LOSSLESS_RATIO,
        "int8": width + 2.0 * width / group,
        "fp8": width + 2.0,
    }[codec]
    return plain * (ZSTD_FACTOR[codec] if compression == "zstd" else 1.0)


def hidden_bytes(counts: TokenCounts, codecs: Codecs, shape: Shape) -> float:
    """Bytes of a cache's shards and index."""
    context = shape.num_captured * layer_bytes(
        codecs.context, shape.width, compression=codecs.compression
    )
    last = (
        layer_bytes(codecs.last, shape.width, compression=codecs.compression)
        if codecs.last
        else 0.0
    )
    return (
        counts.tokens * (context + TOKEN_BYTES)
        + counts.kept_last * last
        + counts.samples * SAMPLE_BYTES
    )


def bytes_by_codec(counts: TokenCounts, chosen: Codecs, shape: Shape) -> dict[str, float]:
    """Bytes of the same cache in every codec, with and without zstd, the last state following
    as it does by default.
    """
    keep = "none" if chosen.last is None else "supervised"
    coded: tuple[Codec, ...] = ("int8", "fp8")
    others = [choose_codecs(codec, None, "none", last_hidden=keep) for codec in CODECS]
    others += [choose_codecs(codec, None, "zstd", last_hidden=keep) for codec in coded]
    return {
        str(codecs): hidden_bytes(counts, codecs, shape)
        for codecs in dict.fromkeys([*others, chosen])
    }


def histogram(lengths: Sequence[int]) -> Histogram:
    """Quantiles of the lengths (none: all zeros) and their distribution."""
    if not lengths:
        return Histogram(0, 0, 0, 0, (0,) * HISTOGRAM_BINS)
    ordered, longest = sorted(lengths), max(lengths)
    p5, p50, p95 = (
        ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.05, 0.5, 0.95)
    )
    bins = [0] * HISTOGRAM_BINS
    for length in ordered:
        bins[min(HISTOGRAM_BINS - 1, HISTOGRAM_BINS * length // max(longest, 1))] += 1
    return Histogram(p5, p50, p95, longest, tuple(bins))


def relative_error(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a sum scaled from this sample, relative to it."""
    count, mean = len(values), sum(values) / max(len(values), 1)
    if count < 2 or mean == 0:
        return 0.0
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return 1.96 * math.sqrt(variance / count) / mean


def puts_per_file(num_bytes: float) -> int:
    """Requests that upload one file: one, or its parts with the calls that open and complete
    them.
    """
    parts = math.ceil(num_bytes / part_bytes(math.ceil(num_bytes)))
    return 1 if parts <= 1 else parts + 2


def put_requests(num_shards: int, *, shard_bytes: float, frozen_bytes: float) -> int:
    """Requests that write a cache: per shard its data, its index rows and its record; then what
    is written once.
    """
    # artifact.json, schema, the target's config, index, manifest
    once = puts_per_file(frozen_bytes) + 5
    return num_shards * (puts_per_file(shard_bytes) + 2) + once


def training_flops(
    counts: TokenCounts, shape: Shape, *, trainable: int, slots: float, positions: float
) -> float:
    """FLOPs of one pass: 6 per trainable parameter and position, 6 per lm_head weight and drafted
    slot.

    Rather too many: context tokens go through only a part of a block draft. The lm_head is frozen:
    two for the draft's forward pass, two back to its input, two for the target's own distribution.
    """
    return 6.0 * (trainable * positions + shape.vocab_size * shape.width * slots) * counts.samples


def shard_notes(num_shards: int, *, shard_bytes: float, shard_rows: int) -> list[str]:
    """Advice where shards are too large for one upload and one spool disk, or so small that
    requests dominate.
    """
    suggested = max(1, int(shard_rows * GOOD_SHARD_BYTES / max(shard_bytes, 1)))
    if suggested >= 8:
        suggested -= suggested % 8
    if shard_bytes > MAX_SHARD_BYTES:
        what = f"a shard takes {human_bytes(shard_bytes)}: more than one upload and one spool disk should carry"
        return [f"{what}; set prompts.shard_rows to about {suggested}"]
    if shard_bytes < MIN_SHARD_BYTES and num_shards * shard_bytes > GOOD_SHARD_BYTES:
        return [
            f"a shard takes only {human_bytes(shard_bytes)}: set prompts.shard_rows to about {suggested} for fewer files and requests"
        ]
    return []


def room(num_bytes: float, store: Store, *, min_free_gb: float) -> Fit:
    """Whether so many bytes fit, once it is known that the store can be written to.

    Raises:
        StoreError: nothing can be written there.
    """
    store.check_writable()
    # a bucket has no end; its spool disk holds a few shards at a time
    free = store.free_bytes() if store.is_local else None
    return Fit(num_bytes, free, min_free_gb * 1e9)


def require_fit(fit: Fit, *, where: str, fix: str) -> None:
    """Raise the StoreError of a cache that does not fit."""
    if fit.fits or fit.free_bytes is None:
        return
    needed, reserve = human_bytes(fit.needed_bytes), human_bytes(fit.reserve_bytes)
    what = f"the hidden states need {needed} and resources.storage.min_free_gb keeps {reserve}, but {human_bytes(fit.free_bytes)} are free"
    raise StoreError(what, where=where, fix=fix)
