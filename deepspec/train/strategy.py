"""How the ranks of a training share its work: what the loop needs of `ddp` and `zero` alike.

Under either, losses and gradients are sums over micro-batches and ranks, divided once by the
denominator of the whole global batch, and AdamW steps on float32 master weights. Its state is
written and read as whole tensors under the parameters' names, so that one strategy resumes from the
other's checkpoints, on any number of ranks.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from deepspec.config.draft import TrainConfig
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.loss import LossOutput
from deepspec.model.memory import is_out_of_memory
from deepspec.target.loading import DTYPES
from deepspec.train.distributed import World
from deepspec.train.out_of_memory import halves

log = logging.getLogger(__name__)

BETAS = (0.9, 0.999)
EPS = 1e-8


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
        self.num_splits = 0  # micro-batches so far that did not fit into memory, nor halves of them

    def loss(self, batch: TrainBatch, plan: Any) -> LossOutput:
        """The draft's loss on a micro-batch."""
        return loss_computed_in(self.settings.compute_dtype, self.draft, batch, plan)

    def rounds(self, own: int) -> int:
        """Calls of `backward` that this rank makes in a step with `own` micro-batches (trap D3)."""
        return own

    @abstractmethod
    def backward(self, batch: TrainBatch | None, plan: Any = None) -> LossOutput:
        """Add the gradient of a micro-batch's loss numerator.

        None adds nothing: it keeps this rank in step with those that have more micro-batches.
        Without the draft's plan of the batch one is made.
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


class Replicated(Strategy):
    """`train.strategy: ddp`: every rank holds the whole draft and optimizer.

    Ranks meet only in `apply`, where gradients are summed. Another optimizer goes in here, and into
    `deepspeed_setup.derived_config` for ZeRO.
    """

    def __init__(self, draft: Drafter, settings: TrainConfig, world: World) -> None:
        super().__init__(draft, settings, world)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.lr,
            betas=BETAS,
            eps=EPS,
            weight_decay=settings.weight_decay,
            **adamw_kernel(world.device),
        )
        # Where memory ends amid a backward pass, some gradients are whole and some are missing.
        self._added: set[Tensor] = set()
        for parameter in self.parameters.values():
            parameter.register_post_accumulate_grad_hook(self._added.add)

    def backward(self, batch: TrainBatch | None, plan: Any = None) -> LossOutput:
        """Add the gradient of a micro-batch's loss numerator.

        One that does not fit into memory is split in two and done again; no other rank notices, as
        ranks meet only in `apply`.
        """
        assert batch is not None  # noqa: S101 - `rounds` asks for no more than there are
        return self._add_gradients(batch, plan, list(self.parameters.values()))

    def _add_gradients(
        self, batch: TrainBatch, plan: Any, parameters: Sequence[nn.Parameter]
    ) -> LossOutput:
        """Add the gradient of these parameters, all of them or what a failed pass left out."""
        self._added.clear()
        try:
            return self._pass(batch, plan, parameters)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if len(batch.seeds) == 1 or not is_out_of_memory(error):
                raise
            self._record_split(batch, error)
        # Here the error is gone, and with it all that the failed pass held.
        left = [parameter for parameter in parameters if parameter not in self._added]
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        first, second = halves(batch)
        return self._add_gradients(first, None, left).plus(self._add_gradients(second, None, left))

    def _pass(self, batch: TrainBatch, plan: Any, parameters: Sequence[nn.Parameter]) -> LossOutput:
        output = self.loss(batch, self.draft.plan(batch) if plan is None else plan)
        if len(parameters) == len(self.parameters):
            output.numerator.backward()  # without the search of a chosen few in the graph
        elif parameters:
            output.numerator.backward(inputs=parameters)
        return output

    def _record_split(self, batch: TrainBatch, error: RuntimeError) -> None:
        self.num_splits += 1
        if self.num_splits == 1:
            log.warning(
                "stage=train a micro-batch of samples=%d tokens=%d does not fit into memory and is "
                "done again in two halves, in up to twice the time (micro_batch_splits in "
                "metrics.jsonl counts all such); smaller resources.memory.batch_slots or "
                "batch_tokens save that: %s",
                len(batch.seeds),
                len(batch.input_ids),
                str(error).partition("\n")[0],
            )

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
        # Only the fused kernel counts its steps on the device; others would wait for the number.
        stays = key == "step" and not self.optimizer.defaults["fused"]
        self.optimizer.state[parameter][key] = tensor if stays else tensor.to(parameter.device)


def loss_computed_in(
    compute_dtype: str, draft: Drafter, batch: TrainBatch, plan: Any
) -> LossOutput:
    """The draft's loss on a micro-batch, its matrix products in `train.compute_dtype`."""
    dtype, device = DTYPES[compute_dtype], batch.context.device.type
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        return draft.loss(batch, plan)


def adamw_kernel(device: torch.device) -> dict[str, Any]:
    """Which of AdamW's kernels steps on this device.

    `foreach` holds a copy of all parameters while it steps, `fused` none; on CPUs it is as fast.
    """
    return {"fused": True} if device.type == "cuda" else {"foreach": True}


def learning_rate(step: int, *, total: int, settings: TrainConfig) -> float:
    """The rate of step `step` (0-based): linear warm-up, then a cosine to zero at `total`."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def trainable(draft: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    named = draft.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}
