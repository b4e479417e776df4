"""AdamW on float32 master weights, with a cosine schedule and warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from deepspec.config.draft import TrainConfig

BETAS = (0.9, 0.999)
EPS = 1e-8


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: TrainConfig
) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        list(parameters.values()),
        lr=settings.lr,
        betas=BETAS,
        eps=EPS,
        weight_decay=settings.weight_decay,
        foreach=True,
    )


def learning_rate(step: int, *, total: int, settings: TrainConfig) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then a cosine to zero at
    `total`.
    """
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def apply_step(
    optimizer: torch.optim.Optimizer, *, lr: float, denominator: float, clip: float
) -> float:
    """Turn summed gradients into means, clip, step, clear; returns the norm before clipping."""
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    for group in optimizer.param_groups:
        group["lr"] = lr
    if denominator > 0:
        torch._foreach_div_([parameter.grad for parameter in parameters], denominator)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip))
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def trainable(draft: nn.Module) -> Mapping[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad
    }
