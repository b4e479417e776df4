"""What is here: versions, whether the GPU can be used and compiled for, and its two rates that
everything else is compared with.
"""

import importlib.metadata
import importlib.util
import platform
import time

import torch

from benchmarks.gpu_check.section import Bench
from deepspec.process.machine import driver_version, missing_for_triton, visible_gpus
from deepspec.target.device import HAS_BFLOAT16, choose_device


def check(bench: Bench) -> None:
    versions(bench)
    with bench.part("the device can be used in bfloat16"):
        chosen = choose_device("cpu" if bench.rehearse else "cuda", dtype="bfloat16")
        bench.findings.check("the device can be used in bfloat16", chosen == bench.device, chosen)
    with bench.part("PyTorch compiles"):
        began = time.perf_counter()
        # a CPU would take half a minute on busy cores
        compiled = torch.compile(torch.square, backend="eager" if bench.rehearse else "inductor")
        squares = compiled(torch.full((64,), 3.0, device=bench.device))
        bench.findings.check("PyTorch compiles", bool((squares == 9).all()))
        bench.findings.figure("compiling a small function, s", time.perf_counter() - began)
    rates(bench)


def versions(bench: Bench) -> None:
    """The figures of the table's first line, and whether the counts of GPUs agree."""
    on_gpu, figure = bench.device.type == "cuda", bench.findings.figure
    figure("date", time.strftime("%Y-%m-%d"))
    figure("GPU", torch.cuda.get_device_name() if on_gpu else "none (rehearsed on a CPU)")
    figure("driver", driver_version())
    figure("torch", torch.__version__)
    figure("CUDA", torch.version.cuda)
    for shown, package in (("Triton", "triton"), ("transformers", "transformers")):
        found = importlib.util.find_spec(package) is not None
        figure(shown, importlib.metadata.version(package) if found else None)
    figure("Python", platform.python_version())
    if on_gpu:
        capability = torch.cuda.get_device_capability()
        figure("memory, GB", torch.cuda.get_device_properties(0).total_memory / 1e9)
        bench.findings.check("bfloat16", capability >= HAS_BFLOAT16, capability)
        seen = visible_gpus(), torch.cuda.device_count()
        bench.findings.check("GPUs are counted as CUDA counts them", len(seen[0]) == seen[1], seen)
    lacks = missing_for_triton()
    bench.findings.check("Triton has a compiler and headers", not lacks or bench.rehearse, lacks)


def rates(bench: Bench) -> None:
    """Copies and matrix products; the best that a step could do follows from them."""
    size, num_bytes = (256, 1 << 20) if bench.rehearse else (8192, 1 << 32)
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    taken = bench.seconds(lambda: a @ b)
    bench.findings.figure("bfloat16 matrix product, TFLOP/s", 2 * size**3 / taken / 1e12)
    source = torch.full((num_bytes,), 7, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    taken = bench.seconds(lambda: target.copy_(source))
    bench.findings.figure("copy on the device, GB/s read and written", 2 * num_bytes / taken / 1e9)
    host = torch.empty(num_bytes // 4, dtype=torch.uint8, pin_memory=not bench.rehearse)
    taken = bench.seconds(lambda: host.copy_(source[: len(host)], non_blocking=True))
    bench.findings.figure("copy to pinned memory of the host, GB/s", len(host) / taken / 1e9)
    bench.findings.check("the copy is whole", (host == 7).all())
