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
            self.totals[name] = self.totals.get(name, 0) + pair

    def read(self, world: World) -> dict[str, float]:
        """Means over all ranks since the last reading, which all ranks make together.

        `acceptance_length` is the expected tokens a round at the acceptance rates found.
        """
        sums: dict[str, Tensor] = {}
        # A rank that had nothing to train on has no names, and takes part all the same (trap D3).
        for totals in world.gather(self.totals):
            for name, pair in totals.items():
                sums[name] = sums.get(name, 0) + pair
        self.totals = {}
        means = {
            name: float(total / count) if count else 0.0
            for name, (total, count) in sorted(sums.items())
        }
        accept = sorted(int(name[len(ACCEPT) :]) for name in means if name.startswith(ACCEPT))
        if accept:
            rates = torch.tensor([means[f"{ACCEPT}{position}"] for position in accept])
            means["acceptance_length"] = 1.0 + float(rates.cumprod(0).sum())
        return means
