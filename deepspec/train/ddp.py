"""`train.strategy: ddp`: each rank holds the whole draft and optimizer; gradients are summed."""

from collections.abc import Iterator, Mapping

import torch

from deepspec.config.draft import TrainConfig
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.loss import LossOutput
from deepspec.train.distributed import World
from deepspec.train.optimizer import apply_step, make_optimizer, trainable
from deepspec.train.strategy import COMPUTE_DTYPES, Piece, autocast_loss


class Replicated:
    """A draft that every rank holds whole; satisfies `strategy.Strategy`."""

    def __init__(self, draft: Drafter, settings: TrainConfig, world: World) -> None:
        self.draft = draft.train()
        self.settings = settings
        self.world = world
        self.parameters = trainable(draft)
        self.optimizer = make_optimizer(self.parameters, settings)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Elements of each trainable parameter."""
        return {name: parameter.numel() for name, parameter in self.parameters.items()}

    def rounds(self, own: int) -> int:
        """Its own: ranks meet only in `apply`."""
        return own

    def backward(self, batch: TrainBatch | None) -> LossOutput:
        """Add the gradient of a micro-batch's loss numerator."""
        assert batch is not None  # noqa: S101 - `rounds` asks for no more than there are
        dtype = COMPUTE_DTYPES[self.settings.compute_dtype]
        plan = self.draft.plan(batch)
        output = autocast_loss(self.draft, batch, plan, device=self.world.device, dtype=dtype)
        output.numerator.backward()
        return output

    def apply(self, *, lr: float, denominator: float) -> float:
        """Sum the gradients over the ranks and step."""
        for parameter in self.parameters.values():
            # In no loss, like a head whose term has no weight: it decays as under `deepspeed`.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.world.sum_gradients(self.parameters.values())
        if not denominator:
            return 0.0
        return apply_step(self.optimizer, lr=lr, denominator=denominator, clip=self.settings.clip)

    def whole(self) -> Drafter:
        """The draft itself."""
        return self.draft

    def optimizer_state(self, name: str) -> Iterator[Piece]:
        """The optimizer's state of a parameter."""
        for key, value in self.optimizer.state.get(self.parameters[name], {}).items():
            yield Piece(key, torch.as_tensor(value).detach())

    def restore(self, name: str, piece: Piece) -> None:
        """Set one piece of the optimizer's state of a parameter."""
        parameter = self.parameters[name]
        tensor = piece.tensor if piece.key == "step" else piece.tensor.to(parameter.device)
        self.optimizer.state[parameter][piece.key] = tensor
