"""How a training pass is run: compiled, or with layers computed once more in the backward pass."""

import importlib
import logging
import subprocess
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError
from deepspec.process.machine import missing_compiler

log = logging.getLogger(__name__)

# what a compiled pass rounds its numbers of tokens and blocks up to: shapes then repeat
FILL_TOKENS, FILL_BLOCKS = 128, 16
# Versions of a compiled function: for few and many positions, inputs with and without gradients,
# training and measuring, each dtype. At PyTorch's own limit of 8 it would quietly compute without.
MOST_VERSIONS = 64


class Execution(NamedTuple):
    """Nothing of it changes a result beyond rounding."""

    # what is computed position by position, and the loss's terms; attention has a compiled kernel
    # of its own
    compile: bool = False
    # a layer's inputs are kept for the backward pass, and nothing of what it computes
    recompute: bool = False

    def positionwise(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """What `function` returns; compiled where `compile` is set."""
        return (compiled(function) if self.compile else function)(*inputs)

    def layer(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """What `function` returns; computed again in the backward pass where `recompute` is set."""
        if not (self.recompute and torch.is_grad_enabled()):
            return function(*inputs)
        return cast("Tensor", checkpoint(function, *inputs, use_reentrant=False))


@lru_cache
def compiled(function: Callable[..., Any], **options: bool) -> Callable[..., Any]:
    """The compiled function: one for all layers, which are an input like any other, and lengths.

    The options are those of PyTorch's compiler, Inductor.
    """
    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    return torch.compile(function, dynamic=True, options=dict(options) or None)


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether the run's training compiles on this device; tried and logged once.

    `auto` compiles on a GPU, unless nothing can be compiled there.

    Raises:
        ConfigError: it is to compile in any case, and cannot.
    """
    setting = config.resources.training.compile
    if not setting or (setting == "auto" and device.type == "cpu"):
        return False
    return _compiles(device.type, partitioned=config.partitions_weights, must=setting is True)


@lru_cache
def _compiles(device: str, *, partitioned: bool, must: bool) -> bool:
    lacks = " and ".join(missing_compiler(on_gpu=device == "cuda"))
    if partitioned:
        reason: str | None = "DeepSpeed fetches weights layer by layer (zero_stage 3)"
    else:
        reason = f"{lacks} not found" if lacks else _failure(device)
    if reason is None:
        log.info("training compile=on device=%s", device)
        return True
    if must:
        raise ConfigError(
            f"training cannot be compiled here: {reason}",
            where="resources.training.compile",
            fix="apt install g++ python3-dev (docs/gpu.md), or set it to auto or false",
        )
    log.warning(
        "training compile=off device=%s FALLBACK: %s. The cost: norms, rotations, activations and "
        "the loss's terms are kernels and tensors of their own, so that steps are slower and need "
        "more memory (docs/gpu.md)",
        device,
        reason,
    )
    return False


def _failure(device: str) -> str | None:
    """Why a small function cannot be compiled and run there; None where it can."""
    try:
        compiled(torch.square)(torch.ones(2, device=device))
    except torch.OutOfMemoryError:
        raise  # it tells nothing about the compiler
    except compiler_errors() as error:
        return str(error).strip().partition("\n")[0]
    return None


def compiler_errors() -> tuple[type[Exception], ...]:
    """What torch's compiler, Triton and a C compiler raise where a kernel cannot be made.

    The last two are not wrapped: gcc that does not find Python's headers, for example, and folders
    for compiled code that cannot be written to.
    """
    errors = RuntimeError, subprocess.SubprocessError, OSError
    try:
        triton = importlib.import_module("triton.runtime.errors")
    except ImportError:
        return errors
    return (*errors, cast("type[Exception]", triton.TritonError))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with `x` compute in: its own dtype, or autocast's where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
