"""Triton's driver of a machine without a GPU.

vLLM's newer model runner, the only one that has DSpark drafts, wants an active driver of Triton.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    """Kernels are run by Triton's interpreter, on the CPU's memory."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("kernels of the interpreter are not timed")

    def get_device_interface(self):
        return torch.cpu
