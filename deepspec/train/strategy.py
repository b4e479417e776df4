"""How the ranks of a training share its work: `ddp` is here, DeepSpeed's ZeRO in `zero`, and the loop talks to both alike.

Under either, losses and gradients are sums over micro-batches and ranks, divided once by the denominator of the whole global
batch; and the optimizer's state goes to disk and comes back as whole tensors under the parameters' names, so that one goes on
from the other's checkpoints, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deepspec.artifacts.artifact import Artifact
from deepspec.config.run import RunConfig, TrainConfig
from deepspec.model.drafter import TrainBatch
from deepspec.model.loss import LossOutput
from deepspec.train.optimizer import apply_step, make_optimizer, trainable
from deepspec.train.distributed import World

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
        """Calls of `backward` that a step takes on this rank, of which `own` have a micro-batch (trap D3)."""
        ...

    def backward(self, batch: TrainBatch | None) -> LossOutput:
        """Add the gradient of a micro-batch's loss numerator; None adds nothing, and only keeps up with the other ranks."""
        ...

    def apply(self, *, lr: float, denominator: float) -> float:
        """Sum the gradients over the ranks, divide, clip, step, clear; returns the norm before clipping.

        Where that is not finite, no parameter has changed.
        """
        ...

    def whole(self) -> Any:
        """The draft in float32 and one piece, as it is now; to be read, and let go of before the next step."""
        ...

    def optimizer_state(self, name: str) -> Iterator[Piece]:
        """What the optimizer keeps for a parameter; good until the next one is asked for."""
        ...

    def restore(self, name: str, piece: Piece) -> None: ...


class Replicated:
    """`ddp`: parameters, gradients and optimizer whole on every rank, and one sum of gradients a step."""

    def __init__(self, draft: Any, settings: TrainConfig, world: World) -> None:
        self.draft, self.settings, self.world = draft.train(), settings, world
        self.parameters = trainable(draft)
        self.optimizer = make_optimizer(self.parameters, settings)

    @property
    def sizes(self) -> Mapping[str, int]:
        return {name: parameter.numel() for name, parameter in self.parameters.items()}

    def rounds(self, own: int) -> int:
        return own

    def backward(self, batch: TrainBatch | None) -> LossOutput:
        if batch is None:
            raise ValueError("ranks that have nothing to train on need not keep up")
        dtype = COMPUTE_DTYPES[self.settings.compute_dtype]
        plan = self.draft.plan(batch)
        with torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype != torch.float32):
            output: LossOutput = self.draft.loss(batch, plan)
        output.numerator.backward()
        return output

    def apply(self, *, lr: float, denominator: float) -> float:
        for parameter in self.parameters.values():
            if parameter.grad is None:  # in no loss, as a head whose term has no weight: it decays as it does on any number of ranks
                parameter.grad = torch.zeros_like(parameter)
        self.world.sum_gradients(self.parameters.values())
        if not denominator:
            return 0.0
        return apply_step(self.optimizer, lr=lr, denominator=denominator, clip=self.settings.clip)

    def whole(self) -> Any:
        return self.draft

    def optimizer_state(self, name: str) -> Iterator[Piece]:
        for key, value in self.optimizer.state.get(self.parameters[name], {}).items():
            yield Piece(key, torch.as_tensor(value).detach())

    def restore(self, name: str, piece: Piece) -> None:
        parameter = self.parameters[name]
        tensor = piece.tensor if piece.key == "step" else piece.tensor.to(parameter.device)
        self.optimizer.state[parameter][piece.key] = tensor


def check_strategy(config: RunConfig, world: World) -> None:
    """See to it, before anything is read, that `train.strategy` can be had.

    Raises:
        ConfigError: DeepSpeed is asked for, and is not installed.
    """
    if config.train.strategy == "deepspeed":
        from deepspec.train.zero import load_deepspeed

        load_deepspeed(world.device)


def make_strategy(config: RunConfig, artifact: Artifact, world: World, *, draft: Any, filler: Callable[[], TrainBatch]) -> Strategy:
    """The one that `train.strategy` names, with the draft as it is now and an optimizer that has not begun.

    `filler` gives any small batch with something to learn from: what a rank without one of its own goes through.
    """
    if config.train.strategy == "ddp":
        return Replicated(draft, config.train, world)
    from deepspec.train.zero import Zero

    return Zero(config, artifact, world, draft=draft, filler=filler())
