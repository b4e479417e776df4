"""The gate of lossy codecs: how far decoded hidden states are from the originals, and what the
target makes of them.

T tokens, T' tokens whose final hidden state is kept, L layers, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.config.resources import FidelityConfig
from deepspec.errors import FidelityTooLow


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


class _Vectors:
    """Sums over tokens of one tensor's squares [L, D], from which its errors follow."""

    def __init__(self, original: Tensor, decoded: Tensor, *, chunk: int) -> None:
        layers, hidden_size = original.shape[1:]
        self.error = original.new_zeros(layers, hidden_size, dtype=torch.float64)
        self.energy = torch.zeros_like(self.error)
        self.cosines = original.new_ones(len(original), layers, dtype=torch.float32)
        for start in range(0, len(original), chunk):
            rows = slice(start, start + chunk)
            before = original[rows].double()
            after = decoded[rows].reshape(before.shape).double()
            self.error += (after - before).square().sum(dim=0)
            self.energy += before.square().sum(dim=0)
            self.cosines[rows] = _cosine(before, after).float()

    def relative_errors(self) -> Tensor:
        return _ratio(self.error.sum(dim=-1), self.energy.sum(dim=-1))  # [L]

    def channel_errors(self) -> Tensor:
        return _ratio(self.error, self.energy).flatten()  # [L * D]


def measure(
    context: Tensor,
    decoded_context: Tensor,
    *,
    last: Tensor | None,
    decoded_last: Tensor | None,
    logits: Callable[[Tensor], Tensor],
    chunk: int = 256,
) -> Fidelity:
    """Compare the context [T, L, D] and the last hidden states [T', D] with what a codec made of
    them (any shape of that order).

    `logits` maps last hidden states [n, D], in the dtype given here, to the target's logits [n, V].
    Memory is bounded by `chunk` tokens.
    """
    tensors = [_Vectors(context, decoded_context, chunk=chunk)]
    variation = agreement = None
    if last is not None and decoded_last is not None and len(last):
        decoded_last = decoded_last.reshape(last.shape)
        tensors.append(_Vectors(last[:, None], decoded_last, chunk=chunk))
        variation, agreement = _predictions(last, decoded_last, logits, chunk=chunk)
    cosines = torch.cat([tensor.cosines.flatten() for tensor in tensors])
    return Fidelity(
        # `amax` hands on a NaN, which Python's `max` may lose.
        relative_error=float(torch.cat([tensor.relative_errors() for tensor in tensors]).amax()),
        worst_channel_error=float(
            torch.cat([tensor.channel_errors() for tensor in tensors]).amax()
        ),
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
    rules = (
        (
            "relative_error",
            fidelity.relative_error,
            "max_relative_error",
            limits.max_relative_error,
        ),
        ("min_cosine", fidelity.min_cosine, "min_cosine", limits.min_cosine),
        (
            "total_variation",
            fidelity.total_variation,
            "max_total_variation",
            limits.max_total_variation,
        ),
        (
            "argmax_agreement",
            fidelity.argmax_agreement,
            "min_argmax_agreement",
            limits.min_argmax_agreement,
        ),
    )
    broken, names = [], []
    for measured, value, name, limit in rules:
        kept = value is None or (value <= limit if name.startswith("max") else value >= limit)
        if not kept:
            broken.append(f"{measured} is {value:.4g}, {name} is {limit:g}")
            names.append(name)
    if broken:
        fix = (
            "choose a codec that keeps more (lossless keeps everything), "
            f"or change {', '.join(names)} if the loss is acceptable"
        )
        raise FidelityTooLow(
            f"the codec changes the hidden states too much: {'; '.join(broken)}",
            where=where,
            fix=fix,
        )


def _predictions(
    last: Tensor, decoded: Tensor, logits: Callable[[Tensor], Tensor], *, chunk: int
) -> tuple[float, float]:
    """Mean total variation of the next-token distributions, and the share of equal argmaxes."""
    variation = agreement = 0.0
    for start in range(0, len(last), chunk):
        before, after = (
            logits(last[start : start + chunk]).float(),
            logits(decoded[start : start + chunk]).float(),
        )
        variation += (
            float((before.softmax(dim=-1) - after.softmax(dim=-1)).abs().sum(dtype=torch.float64))
            / 2
        )
        agreement += float((before.argmax(dim=-1) == after.argmax(dim=-1)).sum())
    return variation / len(last), agreement / len(last)


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine along the last dimension; a vector of zeros agrees with zeros only."""
    norms = before.norm(dim=-1) * after.norm(dim=-1)
    same = (before == after).all(dim=-1)
    return torch.where(
        same, 1.0, (before * after).sum(dim=-1) / torch.where(norms == 0, 1.0, norms)
    )


def _ratio(error: Tensor, energy: Tensor) -> Tensor:
    """Square root of error over energy; where there was nothing, any error is infinite and none
    is none.
    """
    return torch.where(error == 0, 0.0, error / energy).sqrt()
