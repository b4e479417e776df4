"""Training metrics travel as (sum, count) and are divided once, added up over batches and ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepspec.train.distributed import World

ACCEPT = "accept@"  # + the position in the block, from 1: the metrics of acceptance rates


class StepMetrics:
    """Sums and counts by name since the last reading."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a micro-batch's (sum, count) of each metric."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([torch.as_tensor(total), torch.as_tensor(count)])
            pair = pair.detach().to("cpu", torch.float64)
            self.totals[name] = self.totals[name] + pair if name in self.totals else pair

    def read(self, world: World) -> dict[str, float]:
        """Means over all ranks since the last reading, which all ranks make together.

        `acceptance_length` is the expected tokens a round at the acceptance rates found.
        """
        names = sorted(self.totals)
        num_names = world.largest(len(names))
        if not num_names:
            return {}
        # A rank that had nothing to train on knows no names, and must take part all the same (D3).
        pairs = torch.zeros(num_names, 2, dtype=torch.float64)
        for row, name in enumerate(names):
            pairs[row] = self.totals[name]
        sums = world.sum(pairs.to(world.device)).cpu()
        self.totals = {}
        means = {
            name: float(total / count) if count else 0.0
            for name, (total, count) in zip(names, sums, strict=bool(names))
        }
        accept = sorted(int(name[len(ACCEPT) :]) for name in names if name.startswith(ACCEPT))
        if accept:
            rates = torch.tensor([means[f"{ACCEPT}{position}"] for position in accept])
            means["acceptance_length"] = 1.0 + float(rates.cumprod(0).sum())
        return means
