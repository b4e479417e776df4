"""How the ranks of a training share its work: what the loop needs of `ddp` and of DeepSpeed's ZeRO
alike.

Under either, losses and gradients are sums over micro-batches and ranks, divided once by the
denominator of the whole global batch; and the optimizer's state goes to disk and comes back as
whole tensors under the parameters' names, so that one goes on from the other's checkpoints, on any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

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
    """All ranks call each of these together, but for `backward` with a batch under `ddp`."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Elements of each trainable parameter."""
        ...

    def rounds(self, own: int) -> int:
        """Calls of `backward` that a step takes on this rank, of which `own` have a micro-batch
        (trap D3).
        """
        ...

    def backward(self, batch: TrainBatch | None) -> LossOutput:
        """Add the gradient of a micro-batch's loss numerator; None adds nothing, and only keeps
        up with the other ranks.
        """
        ...

    def apply(self, *, lr: float, denominator: float) -> float:
        """Sum the gradients over the ranks, divide, clip, step, clear; returns the norm before
        clipping.

        Where that is not finite, no parameter has changed.
        """
        ...

    def whole(self) -> Drafter:
        """The draft in float32 and one piece, as it is now; to be read, and let go of before
        the next step.
        """
        ...

    def optimizer_state(self, name: str) -> Iterator[Piece]:
        """What the optimizer keeps for a parameter; good until the next one is asked for."""
        ...

    def restore(self, name: str, piece: Piece) -> None: ...
