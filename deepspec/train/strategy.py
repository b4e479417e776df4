"""How the ranks of a training share its work: what the loop needs of `ddp` and `zero` alike.

Under either, losses and gradients are sums over micro-batches and ranks, divided once by the
denominator of the whole global batch. The optimizer's state is written and read as whole tensors
under the parameters' names, so that one strategy resumes from the other's checkpoints, on any
number of ranks.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.loss import LossOutput

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Piece(NamedTuple):
    """One tensor of a parameter's optimizer state, whole."""

    key: str  # `exp_avg`, `exp_avg_sq`, `step`
    tensor: Tensor


class Strategy(Protocol):
    """All ranks call each of these together, except `backward` with a batch under `ddp`."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Elements of each trainable parameter."""
        ...

    def rounds(self, own: int) -> int:
        """Calls of `backward` that this rank makes in a step with `own` micro-batches (trap D3)."""
        ...

    def backward(self, batch: TrainBatch | None) -> LossOutput:
        """Add the gradient of a micro-batch's loss numerator.

        None adds nothing: it keeps this rank in step with those that have more micro-batches.
        """
        ...

    def apply(self, *, lr: float, denominator: float) -> float:
        """Sum the gradients over the ranks, divide, clip, step, clear; returns the norm unclipped.

        Where the norm is not finite, no parameter has changed.
        """
        ...

    def whole(self) -> Drafter:
        """The whole draft in float32, as it is now; to be dropped before the next step."""
        ...

    def optimizer_state(self, name: str) -> Iterator[Piece]:
        """The optimizer's state of a parameter; each piece is valid until the next is taken."""
        ...

    def restore(self, name: str, piece: Piece) -> None:
        """Set one piece of the optimizer's state of a parameter, before the first step."""
        ...


def autocast_loss(
    draft: Drafter, batch: TrainBatch, plan: Any, *, device: torch.device, dtype: torch.dtype
) -> LossOutput:
    """The draft's loss on a micro-batch, its matrix products computed in `dtype`."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return draft.loss(batch, plan)
