"""AdamW on float32 master weights, with a cosine schedule and warm-up.

Another optimizer goes into `make_optimizer`, and into `deepspeed_setup.derived_config` for ZeRO.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from deepspec.config.draft import TrainConfig

BETAS = (0.9, 0.999)
EPS = 1e-8


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: TrainConfig
) -> torch.optim.Optimizer:
    """A fresh optimizer of these parameters."""
    return torch.optim.AdamW(
        list(parameters.values()),
        lr=settings.lr,
        betas=BETAS,
        eps=EPS,
        weight_decay=settings.weight_decay,
        foreach=True,
    )


def learning_rate(step: int, *, total: int, settings: TrainConfig) -> float:
    """The rate of step `step` (0-based): linear warm-up, then a cosine to zero at `total`."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def trainable(draft: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    named = draft.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}
