"""The gate of lossy codecs: how far decoded hidden states are from the originals, and what the
target makes of them.

T tokens, T' tokens whose final hidden state is kept, L layers, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from deepspec.config.resources import FidelityConfig
from deepspec.errors import FidelityTooLow

CHUNK_TOKENS = 256  # compared at a time: bounds the memory of logits
SMALLEST_NORM = 1e-300  # below that of any vector but zeros


class Fidelity(NamedTuple):
    """Errors are norms of the difference over norms of the original; the final hidden state
    counts as one more layer.
    """

    relative_error: float  # of the worst layer, over all its values
    worst_channel_error: float  # of the worst channel of any layer, over the tokens
    mean_cosine: float  # over tokens and layers
    min_cosine: float  # of the worst token of any layer
    # mean distance of the next-token distributions; None where no final state was given
    total_variation: float | None
    argmax_agreement: float | None  # share of tokens whose likeliest next token stays the same


def measure(
    context: Tensor,
    decoded_context: Tensor,
    *,
    last: Tensor,
    decoded_last: Tensor,
    logits: Callable[[Tensor], Tensor],
) -> Fidelity:
    """Compare the context [T, L, D] and the last hidden states [T', D] with what a codec made of
    them (any shape of that order).

    `logits` maps last hidden states [n, D], in the dtype given here, to the target's logits [n, V].
    """
    pairs = [(context, decoded_context)]
    variation = agreement = None
    if len(last):
        pairs.append((last[:, None], decoded_last))
        variation, agreement = _predictions(last, decoded_last.reshape(last.shape), logits)
    layer_errors, channel_errors, cosines = (
        torch.cat(found) for found in zip(*(_compare(*pair) for pair in pairs), strict=True)
    )
    return Fidelity(
        # `amax` hands on a NaN, which Python's `max` may lose.
        relative_error=float(layer_errors.amax()),
        worst_channel_error=float(channel_errors.amax()),
        mean_cosine=float(cosines.mean()) if len(cosines) else 1.0,
        min_cosine=float(cosines.amin()) if len(cosines) else 1.0,
        total_variation=variation,
        argmax_agreement=agreement,
    )


def refuse(fidelity: Fidelity, limits: FidelityConfig, *, where: str = "") -> None:
    """Let pass what keeps every limit; a number that is not one keeps none.

    Raises:
        FidelityTooLow: naming every limit that is broken.
    """
    values, broken = fidelity._asdict(), {}
    for name, limit in limits:
        measured = name if name in values else name.removeprefix("max_").removeprefix("min_")
        value = values[measured]
        kept = value is None or (value <= limit if name.startswith("max") else value >= limit)
        if not kept:
            broken[name] = f"{measured} is {value:.4g}, {name} is {limit:g}"
    if broken:
        raise FidelityTooLow(
            f"the codec changes the hidden states too much: {'; '.join(broken.values())}",
            where=where,
            fix="choose a codec that keeps more (lossless keeps everything), "
            f"or change {', '.join(broken)} if the loss is acceptable",
        )


def _compare(original: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of each layer [L] and of each channel [L * D], and each vector's cosine [T * L]."""
    error = original.new_zeros(original.shape[1:], dtype=torch.float64)
    energy, cosines = torch.zeros_like(error), []
    for before, after in _chunks(original, decoded.reshape(original.shape)):
        before, after = before.double(), after.double()
        error += (after - before).square().sum(dim=0)
        energy += before.square().sum(dim=0)
        same = (before == after).all(dim=-1)  # a vector of zeros agrees with zeros only
        cosine = cosine_similarity(before, after, dim=-1, eps=SMALLEST_NORM)
        cosines.append(torch.where(same, 1.0, cosine).float().flatten())
    return (
        _ratio(error.sum(dim=-1), energy.sum(dim=-1)),
        _ratio(error, energy).flatten(),
        torch.cat(cosines),
    )


def _predictions(
    last: Tensor, decoded: Tensor, logits: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Mean total variation of the next-token distributions, and the share of equal argmaxes."""
    variation = agreement = 0.0
    for chunk in _chunks(last, decoded):
        before, after = (logits(states).float() for states in chunk)
        distance = (before.softmax(dim=-1) - after.softmax(dim=-1)).abs()
        variation += float(distance.sum(dtype=torch.float64)) / 2
        agreement += float((before.argmax(dim=-1) == after.argmax(dim=-1)).sum())
    return variation / len(last), agreement / len(last)


def _chunks(original: Tensor, decoded: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(original.split(CHUNK_TOKENS), decoded.split(CHUNK_TOKENS), strict=True)


def _ratio(error: Tensor, energy: Tensor) -> Tensor:
    """Square root of error over energy; where there was nothing, any error is infinite and none
    is none.
    """
    return torch.where(error == 0, 0.0, error / energy).sqrt()
