"""`train.strategy: ddp`: parameters, gradients and optimizer whole on every rank, and one sum
of gradients a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from deepspec.config.draft import TrainConfig
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.loss import LossOutput
from deepspec.train.distributed import World
from deepspec.train.optimizer import apply_step, make_optimizer, trainable
from deepspec.train.strategy import COMPUTE_DTYPES, Piece


class Replicated:
    """`ddp`: parameters, gradients and optimizer whole on every rank, and one sum of gradients
    a step.
    """

    def __init__(self, draft: Drafter, settings: TrainConfig, world: World) -> None:
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
            output = self.draft.loss(batch, plan)
        output.numerator.backward()
        return output

    def apply(self, *, lr: float, denominator: float) -> float:
        for parameter in self.parameters.values():
            # in no loss, as a head whose term has no weight: it decays as it does on any number of
            # ranks
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.world.sum_gradients(self.parameters.values())
        if not denominator:
            return 0.0
        return apply_step(self.optimizer, lr=lr, denominator=denominator, clip=self.settings.clip)

    def whole(self) -> Drafter:
        return self.draft

    def optimizer_state(self, name: str) -> Iterator[Piece]:
        for key, value in self.optimizer.state.get(self.parameters[name], {}).items():
            yield Piece(key, torch.as_tensor(value).detach())

    def restore(self, name: str, piece: Piece) -> None:
        parameter = self.parameters[name]
        tensor = piece.tensor if piece.key == "step" else piece.tensor.to(parameter.device)
        self.optimizer.state[parameter][piece.key] = tensor
