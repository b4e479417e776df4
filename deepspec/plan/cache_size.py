"""Bytes of a cache of hidden states, from what its codecs store of a token."""

from deepspec.cache.codec_base import CodecName
from deepspec.cache.codecs import make_codec
from deepspec.cache.format import TOKEN_BYTES
from deepspec.config.data import HiddenConfig
from deepspec.plan.parts import Shape, TokenCounts

# Assumed sizes of zstd frames, from measurements on synthetic and small real models: the exponents
# of lossless, the codes of int8 and fp8. Those of a real target are known once it is captured.
FRAME_RATIOS = {"lossless": 0.38, "int8": 0.945, "fp8": 0.86}
SAMPLE_BYTES = 720 + 60  # the Arrow message's frame, and the row in the index
COMPARED = ("raw", "lossless", "int8", "fp8", "int8 + zstd", "fp8 + zstd")


def codecs_name(settings: HiddenConfig) -> str:
    """The codecs of a cache as a plan shows them: `fp8, last int8 + zstd`."""
    name: str = settings.codec
    if settings.last_hidden != "none" and settings.codec_of_last_hidden != settings.codec:
        name += f", last {settings.codec_of_last_hidden}"
    return name if settings.compression == "none" else f"{name} + {settings.compression}"


def is_assumed(codecs: str) -> bool:
    """Whether the bytes of these codecs depend on how well the states compress."""
    return "lossless" in codecs or "zstd" in codecs


def cache_bytes(counts: TokenCounts, settings: HiddenConfig, shape: Shape) -> float:
    """Bytes of a cache's shards and index."""
    context = shape.num_captured * layer_bytes(settings.codec, settings, shape.width)
    num_bytes = counts.tokens * (context + TOKEN_BYTES) + counts.samples * SAMPLE_BYTES
    if settings.last_hidden == "none":
        return num_bytes
    return num_bytes + counts.kept_last * layer_bytes(
        settings.codec_of_last_hidden, settings, shape.width
    )


def bytes_by_codec(counts: TokenCounts, chosen: HiddenConfig, shape: Shape) -> dict[str, float]:
    """Bytes of the same cache in every codec, with and without zstd, and as it is chosen.

    The final hidden states follow the codec as they do by default.
    """
    sizes: dict[str, float] = {}
    for entry in COMPARED:
        codec, _, compression = entry.partition(" + ")
        changes = {"codec": codec, "last_codec": None, "compression": compression or "none"}
        settings = chosen.model_copy(update=changes)
        sizes[codecs_name(settings)] = cache_bytes(counts, settings, shape)
    return {**sizes, codecs_name(chosen): cache_bytes(counts, chosen, shape)}


def layer_bytes(name: CodecName, settings: HiddenConfig, width: int) -> float:
    """Bytes of one token's hidden state of one layer in this codec."""
    codec = make_codec(name, num_layers=1, hidden_size=width, compression=settings.compression)
    return sum(
        column.token_bytes * (FRAME_RATIOS[name] if column.storage == "frame" else 1.0)
        for column in codec.columns
    )
