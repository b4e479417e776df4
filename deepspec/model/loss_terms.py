"""The loss's terms at a few slots, and the gradient of their weighted sum by the logits.

One function of what the matrix products with the vocabulary return. Compiled for a GPU it is a few
kernels, which keep nothing of size n x V but the gradient in the compute dtype; as it stands, each
of its steps writes such a tensor, in float32. All probabilities are float32.

n slots, u target positions that they are compared with, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)`, or the logits themselves without a cap (Gemma)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class SlotFacts(NamedTuple):
    """What is known of each slot: its target position, its label, the factors of its terms."""

    place: Tensor  # [n] long, in [0, u)
    label: Tensor | None  # [n] long
    ce: Tensor | None  # [n] float32, of the cross-entropy to the label
    soft_ce: Tensor | None  # of the cross-entropy to the target's distribution
    tv: Tensor | None  # of the total variation to the target's distribution


class LogitGradient(NamedTuple):
    """The gradient of the weighted sum [n, V], in the dtype of what the products returned."""

    scored: Tensor  # by `scored`, before the softcap
    bias: Tensor  # by the bias, and by all logits


class SlotTerms(NamedTuple):
    """What was measured at each slot, and the gradient where it was asked for."""

    # [n] float32 each: ce, soft_ce, tv and hits, as the loss's `Scores` have them
    measured: tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]
    gradient: LogitGradient | None


def slot_terms(
    scored: Tensor,
    bias: Tensor | None,
    target: Tensor,
    slots: SlotFacts,
    *,
    cap: float | None,
    with_gradient: bool,
) -> SlotTerms:
    """Terms of slots whose logits are softcap(scored) + bias [n, V], the target's softcap(target)
    [u, V].

    It is to be called with tensors that nothing else keeps: they are dropped on the way.
    """
    dtype, slope = scored.dtype, None
    logits = softcap(scored, cap).float()
    del scored
    if cap is not None:
        slope = 1 - (logits / cap).square()  # d cap tanh(x / cap) / dx = 1 - tanh(x / cap)^2
    if bias is not None:
        logits = (logits + bias).float()  # float64 weights have float32 logits as well
        del bias
    # Once for every position, not once for every slot that is compared with it.
    q = _softmax(softcap(target, cap).float(), is_scaled=cap is not None)[slots.place]
    del target
    ce = soft_ce = hits = None
    log_sum = logits.logsumexp(-1, keepdim=True)
    p = (logits - log_sum).exp_()  # in place of the difference alone
    difference = p - q
    if slots.label is not None:
        ce = (log_sum - logits.gather(-1, slots.label[:, None]))[:, 0]  # -log p(y)
    if slots.soft_ce is not None:
        soft_ce = log_sum[:, 0] - _dot(q, logits)  # -<q, log p>
        hits = (logits.argmax(-1) == q.argmax(-1)).float()
    tv = torch.linalg.vector_norm(difference, 1, dim=-1)  # |p - q|_1
    measured = ce, soft_ce, tv, hits
    if not with_gradient:
        return SlotTerms(measured, None)
    del logits, q  # two such tensors less while the gradient is formed
    gradient = _gradient(slots, p, difference)
    by_bias = gradient.to(dtype)
    by_scored = by_bias if slope is None else (gradient * slope).to(dtype)
    return SlotTerms(measured, LogitGradient(by_scored, by_bias))


def _gradient(slots: SlotFacts, p: Tensor, difference: Tensor) -> Tensor:
    """Gradient of the slots' sum by their logits [n, V].

    With one-hot label y and s = sign(p - q), it is p - y of the cross-entropy, p - q of the
    soft cross-entropy, and p (s - <p, s>) of the total variation.
    """
    ce, soft_ce, tv = (
        None if factor is None else factor[:, None]
        for factor in (slots.ce, slots.soft_ce, slots.tv)
    )
    factor = ce  # of p
    if tv is not None:
        sign = difference.sign()
        by_tv = tv * (sign - _dot(p, sign)[:, None])  # tv: s - <p, s>
        factor = by_tv if ce is None else by_tv + ce  # ce: the p of p - y
    gradient = torch.zeros_like(p) if factor is None else factor * p
    if soft_ce is not None:
        by_soft_ce = soft_ce * difference  # soft_ce: p - q
        gradient = by_soft_ce if factor is None else gradient + by_soft_ce
    if ce is None or slots.label is None:
        return gradient
    label = slots.label[:, None]  # ce: the -y of p - y
    if torch.compiler.is_compiling():  # compared token by token, it is part of the same kernel
        is_label = torch.arange(p.shape[1], device=p.device) == label
        return gradient - torch.where(is_label, ce, 0)
    return gradient.scatter_add_(-1, label, -ce)


def _softmax(logits: Tensor, *, is_scaled: bool) -> Tensor:
    """Row by row, [u, V] -> [u, V]."""
    if is_scaled and torch.compiler.is_compiling():
        # PyTorch's compiler has a softmax of its own for scaled numbers, which keeps all of them.
        return (logits - logits.logsumexp(-1, keepdim=True)).exp()
    return logits.softmax(-1)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Row by row, [n, V] twice -> [n], without their product in memory."""
    if torch.compiler.is_compiling():
        return (first * second).sum(-1)
    return torch.bmm(first[:, None], second[:, :, None])[:, 0, 0]
