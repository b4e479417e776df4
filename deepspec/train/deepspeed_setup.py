"""DeepSpeed loaded as this project uses it, and its configuration, derived from a run's."""

import contextlib
import importlib
import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError
from deepspec.train.distributed import form_group
from deepspec.train.strategy import BETAS, EPS

BUCKET_ELEMENTS = 50_000_000  # gradients reduced together: 200 MB of float32


def derived_config(
    config: RunConfig, *, hidden_size: int, num_parameters: int, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration for a draft of this width and number of trained parameters."""
    train, memory = config.train, config.resources.memory
    bucket = 2 * -(-min(BUCKET_ELEMENTS, num_parameters) // 2)
    zero: dict[str, Any] = {
        "stage": memory.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    in_host_memory = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if memory.offload != "none":
        zero["offload_optimizer"] = in_host_memory
    if memory.offload == "all":
        zero["offload_param"] = in_host_memory
    if memory.zero_stage == 3:
        # Norms stay on every rank: fetching one takes longer than its memory is worth.
        zero["stage3_param_persistence_threshold"] = hidden_size
    # PyTorch's AdamW, also on the CPU: DeepSpeed's kernels are compiled at first use.
    adamw: dict[str, Any] = {
        "lr": train.lr,
        "betas": list(BETAS),
        "eps": EPS,
        "weight_decay": train.weight_decay,
        "torch_adam": True,
    }
    if memory.offload != "none" or device.type == "cuda":
        adamw["fused"] = True
    return {
        # Micro-batches are made by tokens, as many as a step needs: DeepSpeed must not count them.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "optimizer": {"type": "AdamW", "params": adamw},
        "gradient_clipping": train.clip,
        "bf16": {"enabled": train.compute_dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }


def load_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, which logs through this project's log and compiles nothing; loading repeats.

    It needs a process group even for one process, which is made here where there is none.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            deepspeed: Any = importlib.import_module("deepspeed")
    except ImportError as error:
        what = f"DeepSpeed cannot be loaded: {error}"
        fix = "pip install '.[deepspeed]' after torch, or leave train.strategy at ddp"
        raise ConfigError(what, where="train.strategy", fix=fix) from None
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()
    logger.propagate = True
    debugging = logging.getLogger().isEnabledFor(logging.DEBUG)
    logger.setLevel(logging.NOTSET if debugging else logging.WARNING)
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning, "torch.distributed")
    # a shortcut on CPUs that would need gcc
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    form_group(device, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return deepspeed
