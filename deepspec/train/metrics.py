"""Training metrics travel as (sum, count) and are divided once, after adding up over
micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepspec.train.distributed import World


class StepMetrics:
    """Sums and counts by name since the last reading."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, count) in metrics.items():
            pair = (
                torch.stack([torch.as_tensor(total), torch.as_tensor(count)])
                .detach()
                .to("cpu", torch.float64)
            )
            self.totals[name] = self.totals[name] + pair if name in self.totals else pair

    def read(self, world: World) -> dict[str, float]:
        """Means over all ranks; clears the metrics. `acceptance_length` is what the acceptance
        rates promise per round.
        """
        names = sorted(self.totals)
        known = world.largest(len(names))
        if not known:
            return {}
        # A rank that had nothing to train on knows no names, and must take part nevertheless (trap
        # D3).
        pairs = (
            torch.stack([self.totals[name] for name in names])
            if names
            else torch.zeros(known, 2, dtype=torch.float64)
        )
        sums = world.sum(pairs.to(world.device)).cpu()
        self.totals = {}
        means = {
            name: float(total / count) if count else 0.0
            for name, (total, count) in zip(names, sums, strict=bool(names))
        }
        rates = [
            means[name]
            for name in sorted(
                (n for n in names if n.startswith("accept@")), key=lambda n: int(n[7:])
            )
        ]
        if rates:
            means["acceptance_length"] = 1.0 + float(torch.tensor(rates).cumprod(0).sum())
        return means
