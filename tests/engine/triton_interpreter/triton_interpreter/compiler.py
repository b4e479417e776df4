"""Triton's compiler of a machine without a GPU, which never compiles."""

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpreterBackend(BaseBackend):
    """There so that Triton accepts the driver; its interpreter runs what is not compiled."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError("set TRITON_INTERPRET=1: there is no device to compile for")

    def add_stages(self, stages: dict, options: object, language: object) -> None:
        raise NotImplementedError("set TRITON_INTERPRET=1: there is no device to compile for")

    def load_dialects(self, context: object) -> None:
        pass

    def get_module_map(self) -> dict:
        return {}
