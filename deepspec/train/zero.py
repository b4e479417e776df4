"""`train.strategy: deepspeed`: ZeRO shards optimizer state, gradients and parameters over ranks.

DeepSpeed partitions, reduces, clips and steps, by a configuration derived from the run's. This
project keeps the sum over micro-batches and ranks, divided by the global batch's denominator (given
to DeepSpeed as that step's loss scale); the schedule; and the checkpoints, since DeepSpeed's own
can run code when they are read.

Three things about a draft decide how it is wrapped:
- Embedding and lm_head never change, so they stay whole and unrounded on every rank, as buffers.
- Under stage 3 ranks fetch each layer's weights from each other, and must all run the same layers
  the same number of times: a rank without a micro-batch, or with one that has nothing to learn
  from, runs the `filler`, times zero.
- Measuring and saving need the whole draft: they get a copy, filled parameter by parameter.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspec.artifacts.artifact import Artifact
from deepspec.config.run import RunConfig
from deepspec.model.checkpoint import empty_draft, load_tensors
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.loss import LossOutput
from deepspec.storage.store import pretty_json
from deepspec.train.deepspeed_setup import derived_config, load_deepspeed
from deepspec.train.distributed import World
from deepspec.train.strategy import Strategy

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Strategy):
    """A draft under DeepSpeed's engine; the `filler` is a small batch to learn from."""

    def __init__(
        self,
        draft: Drafter,
        config: RunConfig,
        world: World,
        *,
        filler: TrainBatch,
        artifact: Artifact,
    ) -> None:
        super().__init__(draft, config.train, world)
        self.filler = filler
        derived = derived_config(
            config,
            hidden_size=draft.spec.hidden_size,
            num_parameters=sum(self.sizes.values()),
            device=world.device,
        )
        if world.is_first:
            artifact.write("deepspeed.json", pretty_json(derived))
            log.info("stage=train deepspeed.json: %s", json.dumps(derived))
        initial = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.parameters.items()
        }
        frozen_as_buffers(draft)
        self.module = _Loss(self)
        deepspeed = load_deepspeed(world.device)
        # Standard output is for events, one JSON object a line.
        with contextlib.redirect_stdout(sys.stderr):
            self.engine = deepspeed.initialize(
                model=self.module, model_parameters=list(self.parameters.values()), config=derived
            )[0]
        self.zero = self.engine.optimizer
        self.is_partitioned = config.partitions_weights
        # In bfloat16 the engine has rounded them.
        for name, tensor in initial.items():
            self._set(name, tensor, key=None)

    def rounds(self, own: int) -> int:
        """The most that any rank has."""
        most = torch.tensor(own, device=self.world.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def backward(self, batch: TrainBatch | None, plan: Any = None) -> LossOutput:
        """Add the gradient of a micro-batch's loss numerator, or run the filler."""
        if batch is not None and plan is None:
            plan = self.draft.plan(batch)
        if plan is not None and len(plan.targets.in_order):
            loss = self.engine(batch=batch, plan=plan)
            output: LossOutput = self.module.output
        else:
            loss = self.engine(batch=self.filler, plan=self.draft.plan(self.filler)) * 0.0
            output = LossOutput(loss.detach(), loss.detach(), {}, {})
        self.module.output = None
        self.engine.backward(loss)
        return output

    def apply(self, *, lr: float, denominator: float) -> float:
        """Divide the ranks' mean gradients, clip, step, clear; returns the norm unclipped."""
        for group in self.zero.param_groups:
            group["lr"] = lr if denominator else 0.0
        divisor = (denominator or 1.0) / self.world.size
        if hasattr(self.zero, "override_loss_scale"):
            self.zero.override_loss_scale(divisor)
            self.engine.step()
            self.zero.override_loss_scale(1.0)  # the next backward passes multiply by it
        else:  # stage 1 in bfloat16 is a class of its own
            for gradients in self.zero.fp32_groups_gradients_flat:
                gradients.div_(divisor)
            self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def whole(self) -> Drafter:
        """A copy of the whole draft, put together from all ranks."""
        draft = empty_draft(self.draft.spec)
        trained = {name: self._get(name, key=None) for name in self.parameters}
        tensors = dict(self.draft.named_buffers()) | trained
        load_tensors(draft, tensors, dtype=torch.float32, where="the parts of all ranks")
        return draft.eval()

    def optimizer_state(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's state of a parameter, put together from all ranks."""
        states = [state for flat in self._flat() if (state := self.zero.optimizer.state.get(flat))]
        if states:
            yield "step", torch.tensor(float(states[0]["step"]))
            for key in MOMENTS:
                yield key, self._get(name, key=key)

    def restore(self, name: str, key: str, tensor: Tensor) -> None:
        """Set one tensor of the optimizer's state of a parameter."""
        for flat in self._flat():
            state = self.zero.optimizer.state[flat]
            if not state:  # the engine makes it in its first step
                state["step"] = torch.zeros((), device=flat.device)
                state.update({moment: torch.zeros_like(flat) for moment in MOMENTS})
            if key == "step":
                state["step"].fill_(float(tensor))
        if not self.is_partitioned:
            self.zero._lazy_init_hp_params_optimizer_state()
        if key != "step":
            self._set(name, tensor, key=key)

    def _flat(self) -> list[Tensor]:
        """The rank's part of the float32 weights, in the pieces that the optimizer knows."""
        kinds = (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        )
        return list(next(getattr(self.zero, kind) for kind in kinds if hasattr(self.zero, kind)))

    def _get(self, name: str, *, key: str | None) -> Tensor:
        """A parameter (or its moment `key`) put together from all ranks, float32."""
        parameter: Any = self.parameters[name]
        if self.is_partitioned:
            found: Tensor = self.zero.get_full_hp_param(parameter, key)
        else:
            found = parameter.get_full_hp_param(key)
        return found.detach()

    def _set(self, name: str, value: Tensor, *, key: str | None) -> None:
        """Take this rank's part of a parameter (or of its moment `key`) from the whole of it."""
        parameter: Any = self.parameters[name]
        if not self.is_partitioned:
            parameter.set_full_hp_param(value.to(self.world.device), key)
            return
        size = parameter.ds_tensor.ds_numel  # the last rank's part is padded with zeros
        padded = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
        part = padded[size * self.world.rank :][:size].to(self.world.device)
        self.zero.set_local_hp_param(part, parameter, key)


class _Loss(nn.Module):
    """The draft's loss as a module's `forward`, which is what DeepSpeed hooks into."""

    def __init__(self, strategy: Strategy) -> None:
        super().__init__()
        self.draft = strategy.draft
        self.loss = strategy.loss
        self.output: Any = None

    def forward(self, batch: TrainBatch, plan: Any) -> Any:
        self.output = self.loss(batch, plan)
        return self.output.numerator


def frozen_as_buffers(draft: nn.Module) -> None:
    """Turn what is not trained into buffers, which DeepSpeed neither casts, shards nor fetches."""
    for module in draft.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
