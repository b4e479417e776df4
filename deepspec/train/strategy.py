"""How the ranks of a training share its work: what the loop needs of `ddp` and `zero` alike.

Under either, losses and gradients are sums over micro-batches and ranks, divided once by the
denominator of the whole global batch. The optimizer's state is written and read as whole tensors
under the parameters' names, so that one strategy resumes from the other's checkpoints, on any
number of ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepspec.config.draft import TrainConfig
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.loss import LossOutput
from deepspec.target.loading import DTYPES
from deepspec.train.distributed import World
from deepspec.train.optimizer import trainable


class Strategy(ABC):
    """A draft in training, which belongs to its strategy.

    All ranks call each method together, except `backward` with a batch under `ddp`.
    """

    def __init__(self, draft: Drafter, settings: TrainConfig, world: World) -> None:
        self.draft = draft.train()
        self.settings = settings
        self.world = world
        self.parameters = trainable(draft)
        self.sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}

    def loss(self, batch: TrainBatch, plan: Any) -> LossOutput:
        """The draft's loss on a micro-batch, its matrix products in `train.compute_dtype`."""
        dtype = DTYPES[self.settings.compute_dtype]
        with torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.draft.loss(batch, plan)

    def rounds(self, own: int) -> int:
        """Calls of `backward` that this rank makes in a step with `own` micro-batches (trap D3)."""
        return own

    @abstractmethod
    def backward(self, batch: TrainBatch | None) -> LossOutput:
        """Add the gradient of a micro-batch's loss numerator.

        None adds nothing: it keeps this rank in step with those that have more micro-batches.
        """

    @abstractmethod
    def apply(self, *, lr: float, denominator: float) -> float:
        """Sum the gradients over the ranks, divide, clip, step, clear; returns the norm unclipped.

        Where the norm is not finite, no parameter has changed.
        """

    @abstractmethod
    def whole(self) -> Drafter:
        """The whole draft in float32, as it is now; to be dropped before the next step."""

    @abstractmethod
    def optimizer_state(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state of a parameter: `exp_avg`, `exp_avg_sq` and `step`, each whole.

        Each tensor is valid until the next is taken.
        """

    @abstractmethod
    def restore(self, name: str, key: str, tensor: Tensor) -> None:
        """Set one tensor of the optimizer's state of a parameter, before the first step."""
