"""One section in a process of its own: `python -m benchmarks.gpu_check.section NAME OUT SCRATCH`.

A section is a module here with a function `check(bench)`.
"""

import importlib
import logging
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_check.findings import Findings
from deepspec.errors import DeepSpecError
from deepspec.target.device import choose_device


class Part:
    """A block whose error is a check that does not hold, and stops no other part."""

    def __init__(self, findings: Findings, what: str) -> None:
        self.findings, self.what = findings, what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        traceback.print_exception(error)
        first_line = str(error).strip().partition("\n")[0]
        self.findings.check(self.what, ok=False, seen=f"{type(error).__name__}: {first_line}")
        return True


class Bench(NamedTuple):
    """What a section works with."""

    findings: Findings
    scratch: Path  # an empty folder of its own
    device: torch.device
    rehearse: bool  # on a CPU, in tiny shapes

    def part(self, what: str) -> Part:
        return Part(self.findings, what)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], *, rounds: int = 5) -> float:
        """The median of some rounds after one to warm up."""
        taken = []
        for _ in range(rounds + 1):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[1:])

    def peak_gb(self, work: Callable[[], Any]) -> float:
        """Peak of the GPU's memory while `work` runs, in decimal GB; 0 on a CPU."""
        if self.device.type != "cuda":
            work()
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9

    def num_waits(self, work: Callable[[], Any]) -> int:
        """How often PyTorch makes the host wait for the GPU while `work` runs; 0 on a CPU."""
        if self.device.type != "cuda":
            work()
            return 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in caught)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, in float32."""
    wanted = wanted.float()
    return float((found.float() - wanted).norm() / wanted.norm().clamp_min(1e-12))


def main(name: str, out: str, scratch: str, *flags: str) -> None:
    logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s")
    rehearse = "--rehearse" in flags
    findings = Findings(Path(out), name)
    try:
        device = choose_device("cpu" if rehearse else "cuda", dtype="float32")
    except DeepSpecError as error:
        findings.check("the GPU can be used", ok=False, seen=error)
        return
    module = importlib.import_module(f"benchmarks.gpu_check.{name}")
    module.check(Bench(findings, Path(scratch), device, rehearse))


if __name__ == "__main__":
    main(*sys.argv[1:])
