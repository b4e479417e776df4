"""In a child process: a CPU build of PyTorch that believes in one NVIDIA GPU, to compile for it.

Tensors are fake (no memory, no numbers). Kernels are lowered as on the chip and, where asked,
compiled to its machine code by Triton and the assembler that comes with it; none is ever launched.
`tests.gpu.harness` starts the child with the device guard that this needs.
"""

import contextlib
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from tests.gpu.chips import READY, Chip


class Kernel(NamedTuple):
    """One Triton kernel that Inductor generated."""

    name: str
    shared_memory: int | None  # bytes; None where it was only lowered


class Nothing:
    """Stands for streams, guards and kernels: takes every call, does nothing."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, _name: str) -> Any:
        return lambda *_, **__: None

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def believe_in(chip: Chip) -> None:
    """Make torch.cuda and Triton's driver report this chip as the only device.

    Prints `READY` when something was compiled for it.
    """
    properties = types.SimpleNamespace(
        name=chip.name,
        major=chip.capability[0],
        minor=chip.capability[1],
        multi_processor_count=132,
        total_memory=80 << 30,
        L2_cache_size=50 << 20,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        gcnArchName="",
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=chip.shared_memory,
        shared_memory_per_multiprocessor=chip.shared_memory + 1024,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": chip.capability,
        "get_device_properties": properties,
        "get_device_name": chip.name,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "mem_get_info": (2 << 30, 80 << 30),  # the loss then takes chunks of 2^25 logits
        "get_per_process_memory_fraction": 1.0,
        "memory_reserved": 0,
        "memory_allocated": 0,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "current_stream": Nothing(),
        **dict.fromkeys(("_lazy_init", "synchronize", "set_device", "set_rng_state")),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    for name in ("Stream", "stream", "device", "_DeviceGuard"):
        setattr(torch.cuda, name, Nothing)
    torch.version.cuda = "13.0"
    torch._C._cuda_getCurrentRawStream = lambda _device: 0
    torch._C._set_only_lift_cpu_tensors(True)
    _prepare_compilers(chip)
    with fake_tensors(compiling=False) as kernels:
        torch.compile(torch.square)(torch.ones(2, device="cuda"))
    if kernels:
        print(READY, flush=True)


def _prepare_compilers(chip: Chip) -> None:
    """Dynamo, Inductor and Triton for the chip.

    They are imported here because they keep references to functions of torch.cuda.
    """
    import torch._inductor.config as inductor
    import triton
    from torch._C._dynamo import guards
    from torch._inductor.runtime import triton_helpers
    from torch._subclasses.fake_tensor import FakeTensorMode

    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = torch.as_strided
    FakeTensorMode.avoid_device_init = property(lambda _self: True)
    triton.runtime.driver.set_active(_driver(chip))
    triton_helpers.set_driver_to_gpu = lambda: None
    inductor.compile_threads = 1
    inductor.force_disable_caches = True
    inductor.use_static_triton_launcher = False
    inductor.joint_graph_constant_folding = False  # it computes constants on the device
    # Newer PyTorch compiles what does not fit once more without pipelining; older raises.
    if hasattr(inductor.triton, "dynamic_disable_pipelining"):
        inductor.triton.dynamic_disable_pipelining = False


def _driver(chip: Chip) -> Any:
    """The driver that Triton compiles for."""
    from triton.backends.compiler import GPUTarget

    major, minor = chip.capability
    limits = {"max_shared_mem": chip.shared_memory, "multiprocessor_count": 132, "warpSize": 32}
    return types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", major * 10 + minor, 32),
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_stream=lambda *_: 0,
        get_device_capability=lambda *_: chip.capability,
        is_active=lambda: True,
        launcher_cls=Nothing,
        utils=types.SimpleNamespace(
            get_device_properties=lambda _device: limits, load_binary=lambda *_: (0, 0, 0, 0, 1024)
        ),
    )


@contextlib.contextmanager
def fake_tensors(*, compiling: bool) -> Iterator[list[Kernel]]:
    """Within it tensors on "cuda" are fake; receives the kernels that compiled functions generate.

    Where `compiling`, attention's are compiled for the chip as they would be on it, and raise what
    they would raise there; all others are left out.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    kernels: list[Kernel] = []
    compile_for_chip, compile_one = AsyncCompile.triton, CachingAutotuner._precompile_config

    def lowered(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Any:
        if compiling and "flex_attention" in name and "_tem_" in name:
            compile_for_chip(self, name, source, device_str)
        else:
            kernels.append(Kernel(name, None))
        return Nothing()

    def compiled(self: CachingAutotuner, config: Any) -> Any:
        result = compile_one(self, config)
        name = self.inductor_meta["kernel_name"]
        kernels.append(Kernel(name, result.kernel.metadata.shared))
        return result

    AsyncCompile.triton, CachingAutotuner._precompile_config = lowered, compiled
    try:
        with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
            yield kernels
    finally:
        AsyncCompile.triton, CachingAutotuner._precompile_config = compile_for_chip, compile_one
