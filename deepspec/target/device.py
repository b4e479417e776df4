"""The device that a process computes on: the GPU that CUDA gives it, or the CPU.

A GPU that is there and cannot be used is an error, and never the CPU without a word.
"""

import importlib.metadata
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch

from deepspec.errors import ConfigError, DeepSpecError, TransientError
from deepspec.process.machine import (
    OLDEST_DRIVER,
    driver_version,
    missing_for_triton,
    named_gpus,
    visible_gpus,
)

HAS_BFLOAT16 = (8, 0)  # the first compute capability that has (A100, RTX 30)
WEIGHTS_SHARE = 0.8  # of a GPU's free memory; the rest is for keys, values and states
ON_CPU = "resources.devices.type=cpu computes on the CPU"


def choose_device(device: str, *, dtype: str, index: int | None = None) -> torch.device:
    """The device of `resources.devices.type`: `auto` is the GPU if one is visible.

    Args:
        device: `auto`, `cuda` or `cpu`.
        dtype: What is to be computed in, `bfloat16` or `float32`.
        index: Number of the GPU among those that CUDA shows; None is the current one.

    Raises:
        ConfigError: a GPU is visible or demanded, and PyTorch cannot use it, or it is too old for
            bfloat16 or for this build of PyTorch.
        TransientError: the GPU has no room or is in the hands of another process.
    """
    if device == "cpu":
        return torch.device("cpu")
    named = named_gpus()
    if not torch.cuda.is_available():
        visible = visible_gpus()
        if device == "auto" and not visible:
            return torch.device("cpu")
        raise _without_cuda(visible)
    index = torch.cuda.current_device() if index is None else index
    if index >= torch.cuda.device_count():
        what = f"a process for GPU #{index}, but CUDA shows {torch.cuda.device_count()}"
        if named is not None:
            what += f" of CUDA_VISIBLE_DEVICES={','.join(named)}"
        fix = "correct CUDA_VISIBLE_DEVICES, or start fewer ranks (resources.training.ranks)"
        raise ConfigError(what, where="resources.devices", fix=fix)
    chosen = torch.device("cuda", index)
    _check_gpu(chosen, dtype)
    return chosen


def placement(device: torch.device, num_gpus: int) -> dict[str, Any]:
    """Arguments of transformers' `from_pretrained` that load a model there, or over `num_gpus`.

    Its layers are then on the first GPUs, one after the other, as evenly as they go.

    Raises:
        ConfigError: there are not so many GPUs.
    """
    if num_gpus == 1 or device.type == "cpu":
        return {"device_map": {"": device}}
    if num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"a target on {num_gpus} GPUs, but CUDA shows {torch.cuda.device_count()}",
            where="resources.devices.gpus_per_lane",
            fix="lower it, or correct CUDA_VISIBLE_DEVICES",
        )
    room = {gpu: int(torch.cuda.mem_get_info(gpu)[0] * WEIGHTS_SHARE) for gpu in range(num_gpus)}
    return {"device_map": "auto", "max_memory": room}


def check_placement(model: Any, num_gpus: int) -> None:
    """Refuse a model of which a part was left on the host or on the disk.

    Raises:
        ConfigError: the GPUs have too little room for its weights.
    """
    left = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if num_gpus > 1 and left & {"cpu", "disk"}:
        raise ConfigError(
            f"the target's weights do not fit {num_gpus} GPUs",
            where="resources.devices.gpus_per_lane",
            fix="raise it, or free the GPUs of what else runs there",
        )


def describe_device(device: str, *, dtypes: Iterable[str]) -> Iterator[str]:
    """Lines on what a run computes on here, and which optional parts are there to do it faster.

    Raises:
        ConfigError, TransientError: as `choose_device`, for any of the dtypes.
    """
    chosen = {choose_device(device, dtype=dtype) for dtype in dtypes}.pop()
    on_gpu = chosen.type == "cuda"
    yield f"device       {torch.cuda.get_device_name(chosen) if on_gpu else 'CPU'}"
    if not on_gpu:
        return
    yield f"visible      {', '.join(visible_gpus())}"
    driver, cuda = driver_version() or "unknown", torch.version.cuda
    yield f"driver       {driver}, PyTorch {torch.__version__} for CUDA {cuda}"
    lacks = " and ".join(missing_for_triton())
    without = f"LACKS {lacks}: training attends densely, and nothing of it is compiled"
    yield f"Triton       {without if lacks else 'compiles'}"
    for package in ("flash-attn", "deepspeed"):
        version = "not installed"
        with suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
        yield f"{package:12} {version}"


def _without_cuda(visible: list[str]) -> ConfigError:
    """Why PyTorch has no GPU, with both versions that must fit each other."""
    cuda, driver = torch.version.cuda, driver_version()
    if not visible:
        hidden = ": CUDA_VISIBLE_DEVICES hides them all" if named_gpus() is not None else ""
        return ConfigError(
            f"there is no GPU here{hidden}",
            where="resources.devices.type",
            fix="set resources.devices.type to auto or cpu",
        )
    oldest = OLDEST_DRIVER.get((cuda or "").partition(".")[0])
    built = f"PyTorch {torch.__version__} is " + (
        f"built for CUDA {cuda}" if cuda else "a build without CUDA"
    )
    needs = f", which needs driver {oldest} or newer" if oldest else ""
    has = f"the driver here is {driver}" if driver else "no NVIDIA driver is found here"
    if cuda is None:
        fix = "install PyTorch's CUDA build (docs/gpu.md)"
    elif driver is None:
        fix = "install the driver (in a container: the NVIDIA container toolkit, --gpus all)"
    elif oldest and int(driver.partition(".")[0]) < oldest:
        fix = "update the driver, or install a build of PyTorch for an older CUDA (docs/gpu.md)"
    else:
        fix = "see what `nvidia-smi` reports, and whether CUDA_VISIBLE_DEVICES names a GPU of it"
    return ConfigError(
        f"GPU {', '.join(visible)} cannot be used: {built}{needs}; {has} ({_reason()})",
        where="CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else "the driver",
        fix=f"{fix}; or {ON_CPU}",
    )


def _reason() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter of a build without CUDA
        return str(error).partition("\n")[0]
    return "it does work now"


def _check_gpu(device: torch.device, dtype: str) -> None:
    """Compute something there, of what the build has kernels for."""
    name = torch.cuda.get_device_name(device)
    capability = torch.cuda.get_device_capability(device)
    shown = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if dtype == "bfloat16" and capability < HAS_BFLOAT16:
        raise ConfigError(
            f"{shown} has no bfloat16, which this run computes in",
            where="target.dtype, train.compute_dtype, evaluate.dtype",
            fix="set them to float32, which takes twice the memory; or use a GPU of capability "
            f"8.0 or later; or {ON_CPU}",
        )
    try:
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        lacks_kernels = "no kernel image" in str(error)
        kind: type[DeepSpecError] = ConfigError if lacks_kernels else TransientError
        kernels = f", which has kernels for {' '.join(torch.cuda.get_arch_list())}"
        raise kind(
            f"{shown} cannot be used by PyTorch {torch.__version__}"
            f"{kernels if lacks_kernels else ''}: {str(error).partition(chr(10))[0]}",
            where=str(device),
            fix="install a build of PyTorch for this GPU (docs/gpu.md)"
            if lacks_kernels
            else "see in `nvidia-smi` what else runs on it",
        ) from None
