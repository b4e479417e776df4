"""`train.strategy: ddp`: each rank holds the whole draft and optimizer; gradients are summed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from deepspec.config.draft import TrainConfig
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.loss import LossOutput
from deepspec.train.distributed import World
from deepspec.train.optimizer import make_optimizer
from deepspec.train.strategy import Strategy


class Replicated(Strategy):
    """A draft that every rank holds whole; ranks meet only in `apply`."""

    def __init__(self, draft: Drafter, settings: TrainConfig, world: World) -> None:
        super().__init__(draft, settings, world)
        self.optimizer = make_optimizer(self.parameters, settings)

    def backward(self, batch: TrainBatch | None) -> LossOutput:
        """Add the gradient of a micro-batch's loss numerator."""
        assert batch is not None  # noqa: S101 - `rounds` asks for no more than there are
        output = self.loss(batch, self.draft.plan(batch))
        output.numerator.backward()
        return output

    def apply(self, *, lr: float, denominator: float) -> float:
        """Sum the gradients over the ranks, divide, clip, step, clear."""
        gradients = []
        for parameter in self.parameters.values():
            # In no loss, like a head whose term has no weight: it decays as under `deepspeed`.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self.world.size > 1:
            vector_to_parameters(self.world.sum(parameters_to_vector(gradients)), gradients)
        if not denominator:
            return 0.0
        torch._foreach_div_(gradients, denominator)
        norm = float(clip_grad_norm_(self.parameters.values(), self.settings.clip))
        if math.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def whole(self) -> Drafter:
        """The draft itself."""
        return self.draft

    def optimizer_state(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state of a parameter."""
        for key, value in self.optimizer.state.get(self.parameters[name], {}).items():
            yield key, torch.as_tensor(value).detach()

    def restore(self, name: str, key: str, tensor: Tensor) -> None:
        """Set one tensor of the optimizer's state of a parameter."""
        parameter = self.parameters[name]
        placed = tensor if key == "step" else tensor.to(parameter.device)
        self.optimizer.state[parameter][key] = placed
