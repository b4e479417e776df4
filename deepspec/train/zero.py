"""`train.strategy: deepspeed`: ZeRO deals the optimizer's state, the gradients and the parameters
out to the ranks.

DeepSpeed partitions, reduces, clips and steps; it is told so by a configuration derived from ours.
What stays ours: the sum over micro-batches and ranks is divided by the global batch's denominator,
which DeepSpeed is given as that step's loss scale; the schedule; the checkpoints, since its own can
run code when they are read.

Three things about a draft decide how it is wrapped:
- Embedding and lm_head never change, so that they stay whole and in float32 on every rank, as
  buffers.
- Under stage 3 ranks fetch each layer's weights from each other, and must all run the same layers
  the same number of times: a rank without a micro-batch, or with one that has nothing to learn
  from, goes through the `filler`, times zero.
- Measuring and saving want all of it: they get a draft of its own, filled parameter by parameter.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspec.artifacts.artifact import Artifact
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError
from deepspec.model.checkpoint import empty_draft, load_tensors
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.loss import LossOutput
from deepspec.storage.store import pretty_json
from deepspec.train.distributed import World
from deepspec.train.optimizer import BETAS, EPS, trainable
from deepspec.train.strategy import COMPUTE_DTYPES, Piece

log = logging.getLogger(__name__)

BUCKET_ELEMENTS = 50_000_000  # gradients reduced together: 200 MB of float32
MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """A draft under DeepSpeed's engine; satisfies `strategy.Strategy`."""

    def __init__(
        self,
        config: RunConfig,
        artifact: Artifact,
        world: World,
        *,
        draft: Drafter,
        filler: TrainBatch,
    ) -> None:
        self.draft, self.world, self.filler = draft.train(), world, filler
        self.parameters = trainable(draft)
        self.sizes: Mapping[str, int] = {
            name: parameter.numel() for name, parameter in self.parameters.items()
        }
        derived = derived_config(
            config,
            draft.spec.hidden_size,
            num_parameters=sum(self.sizes.values()),
            device=world.device.type,
        )
        if world.is_first:
            artifact.store.write(artifact.path("deepspeed.json"), pretty_json(derived))
            log.info("stage=train deepspeed.json: %s", json.dumps(derived))
        begun = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in self.parameters.items()
        }
        frozen_as_buffers(draft)
        self.module = _Loss(draft, world.device, COMPUTE_DTYPES[config.train.compute_dtype])
        self.deepspeed = load_deepspeed(world.device)
        # events go to standard output, one JSON object a line
        with contextlib.redirect_stdout(sys.stderr):
            self.engine = self.deepspeed.initialize(
                model=self.module, model_parameters=list(self.parameters.values()), config=derived
            )[0]
        self.zero = self.engine.optimizer
        self.is_partitioned = config.resources.memory.zero_stage == 3
        for name, tensor in begun.items():  # in bfloat16 they would be what was left after rounding
            self._set(name, tensor, key=None)

    def rounds(self, own: int) -> int:
        return self.world.largest(own)

    def backward(self, batch: TrainBatch | None) -> LossOutput:
        plan = self.draft.plan(batch) if batch is not None else None
        idle = plan is None or not any(
            bool(part) for part in self.draft.denominators(plan).values()
        )
        if idle or batch is None:
            loss = self.engine(batch=self.filler, plan=self.draft.plan(self.filler)) * 0.0
            output = LossOutput(loss.detach(), loss.detach(), {}, {})
        else:
            loss = self.engine(batch=batch, plan=plan)
            output = cast("LossOutput", self.module.output)
        self.module.output = None
        self.engine.backward(loss)
        return output

    def apply(self, *, lr: float, denominator: float) -> float:
        for group in self.zero.param_groups:
            group["lr"] = lr if denominator else 0.0
        # what arrives is the ranks' mean
        with self._divided(by=(denominator or 1.0) / self.world.size):
            self.engine.step()
        return float(self.engine.get_global_grad_norm())

    @contextlib.contextmanager
    def _divided(self, *, by: float) -> Iterator[None]:
        """Within the block, a step divides the gradients by this."""
        if hasattr(self.zero, "override_loss_scale"):
            self.zero.override_loss_scale(by)
            yield
            self.zero.override_loss_scale(1.0)  # the next backward passes multiply by it
            return
        # stage 1 in bfloat16 is a class of its own
        for gradients in self.zero.fp32_groups_gradients_flat:
            gradients.div_(by)
        yield

    def whole(self) -> Drafter:
        draft = empty_draft(self.draft.spec)
        tensors = dict(self.draft.named_buffers()) | {
            name: self._get(name, key=None) for name in self.parameters
        }
        load_tensors(draft, tensors, dtype=torch.float32, where="the parts of all ranks")
        return draft.eval()

    def optimizer_state(self, name: str) -> Iterator[Piece]:
        states = [state for flat in self._flat() if (state := self.zero.optimizer.state.get(flat))]
        if states:
            yield Piece("step", torch.tensor(float(states[0]["step"])))
            yield from (Piece(key, self._get(name, key=key)) for key in MOMENTS)

    def restore(self, name: str, piece: Piece) -> None:
        for flat in self._flat():
            state = self.zero.optimizer.state[flat]
            if not state:  # it comes to be in the first step, which has not been
                state.update(
                    {"step": torch.tensor(0.0), **{key: torch.zeros_like(flat) for key in MOMENTS}}
                )
            if piece.key == "step":
                state["step"].fill_(float(piece.tensor))
        if not self.is_partitioned:
            self.zero._lazy_init_hp_params_optimizer_state()
        if piece.key != "step":
            self._set(name, piece.tensor, key=piece.key)

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
        utils, parameter = self.deepspeed.utils, self.parameters[name]
        if key is None:
            return cast("Tensor", utils.safe_get_full_fp32_param(parameter)).detach()
        return cast("Tensor", utils.safe_get_full_optimizer_state(parameter, key)).detach()

    def _set(self, name: str, value: Tensor, *, key: str | None) -> None:
        """Take this rank's part of a parameter (or of its moment `key`) from the whole of it."""
        parameter: Any = self.parameters[name]
        if not self.is_partitioned:
            parameter.set_full_hp_param(value.to(self.world.device), key)
            return
        size = parameter.ds_tensor.ds_numel  # the last rank's part is filled up with zeros
        padded = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
        self.zero.set_local_hp_param(
            padded[size * self.world.rank :][:size].to(self.world.device), parameter, key
        )


class _Loss(nn.Module):
    """The draft's loss as a module's `forward`, which is what DeepSpeed hooks into."""

    def __init__(self, draft: Drafter, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.draft, self.device_type, self.dtype = draft, device.type, dtype
        self.output: LossOutput | None = None

    def forward(self, batch: TrainBatch, plan: Any) -> Tensor:
        with torch.autocast(
            self.device_type, dtype=self.dtype, enabled=self.dtype != torch.float32
        ):
            self.output = self.draft.loss(batch, plan)
        return self.output.numerator


def frozen_as_buffers(draft: nn.Module) -> None:
    """What is not trained is no parameter any more: nobody casts it, deals it out or fetches it."""
    for module in draft.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def derived_config(
    config: RunConfig, hidden_size: int, *, num_parameters: int, device: str
) -> dict[str, Any]:
    """DeepSpeed's configuration; `hidden_size` is the draft's width, `num_parameters` what it
    trains.
    """
    train, resources = config.train, config.resources
    bucket = 2 * -(-min(BUCKET_ELEMENTS, num_parameters) // 2)
    zero: dict[str, Any] = {
        "stage": resources.memory.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    in_host_memory = {"device": "cpu", "pin_memory": device == "cuda"}
    if resources.memory.offload != "none":
        zero["offload_optimizer"] = in_host_memory
    if resources.memory.offload == "all":
        zero["offload_param"] = in_host_memory
    if resources.memory.zero_stage == 3:
        # norms stay: to fetch one takes longer than it is worth
        zero["stage3_param_persistence_threshold"] = hidden_size
    # PyTorch's AdamW, also on the CPU: DeepSpeed's kernels are compiled at first use.
    adamw = {
        "lr": train.lr,
        "betas": list(BETAS),
        "eps": EPS,
        "weight_decay": train.weight_decay,
        "torch_adam": True,
    }
    return {
        # Micro-batches are made by tokens, as many as a step needs: their number is not DeepSpeed's
        # to count.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "optimizer": {
            "type": "AdamW",
            "params": adamw | ({"fused": True} if resources.memory.offload != "none" else {}),
        },
        "gradient_clipping": train.clip,
        "bf16": {"enabled": train.compute_dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }


def load_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, logging where we do, compiling nothing, and with a process group even for one
    process; again and again the same.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            deepspeed: Any = importlib.import_module("deepspeed")
    except ImportError as error:
        fix = "pip install '.[deepspeed]' after torch (README, Training on several GPUs), or leave train.strategy at ddp"
        raise ConfigError(
            f"DeepSpeed cannot be loaded: {error}", where="train.strategy", fix=fix
        ) from None
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(
        logging.NOTSET if logging.getLogger().isEnabledFor(logging.DEBUG) else logging.WARNING
    )
    warnings.filterwarnings(
        "ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed"
    )
    # a shortcut on CPUs that would need gcc
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    return deepspeed
