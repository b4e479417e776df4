"""Children that compile for a GPU that is not there: starts them, or reports why it cannot.

They need a CPU build of PyTorch, g++, and Triton in a folder of its own (`make gpu-compiler`), so
that the other tests run as on any machine without one.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from tests.conftest import REPOSITORY
from tests.gpu.chips import READY

TRITON = Path(os.environ.get("DEEPSPEC_TEST_TRITON") or Path(sys.prefix) / "gpu-compiler")
# The guard has to be there before PyTorch asks for a device.
START = (
    "import ctypes, runpy, sys; guard, module = sys.argv[1:3]; "
    "ctypes.CDLL(guard, mode=ctypes.RTLD_GLOBAL); runpy.run_module(module, run_name='__main__')"
)


def missing() -> str | None:
    """What stands in the way of compiling for a GPU here; None where nothing does."""
    if torch.version.cuda or torch.version.hip:
        return "a PyTorch that is built for GPUs cannot be made to believe in another one"
    if shutil.which("g++") is None:
        return "no g++, which builds the fake device guard"
    if not (TRITON / "triton").is_dir():
        return f"no Triton in {TRITON} (`make gpu-compiler` installs it)"
    return None


@functools.cache
def device_guard(folder: Path) -> Path:
    """The shared library of guard.cpp; skips the test where this PyTorch does not compile it."""
    library, torch_lib = folder / "guard.so", Path(torch.__file__).parent / "lib"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-o", library]
    command += [Path(__file__).with_name("guard.cpp"), f"-L{torch_lib}", "-lc10", "-ltorch_cpu"]
    command += [f"-Wl,-rpath,{torch_lib}", *(f"-isystem{path}" for path in include_paths())]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"torch {torch.__version__} has another device guard: {built.stderr[:500]}")
    return library


def in_child(module: str, request: dict[str, Any], *, guard: Path, timeout_s: float) -> list[Any]:
    """What the module prints as JSON lines for the request; skips where the pretence fails.

    The module calls `pretence.believe_in` first, and prints `READY` when it works.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, TRITON))),
        "TRITON_CACHE_DIR": str(guard.parent / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(guard.parent / "inductor"),
        "PYTHONWARNINGS": "ignore",
    }
    child = subprocess.run(
        [sys.executable, "-c", START, guard, module, json.dumps(request)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    ready, *lines = child.stdout.splitlines() or [""]
    if ready != READY:
        pytest.skip(f"torch {torch.__version__} does not believe in it: {child.stderr[-500:]}")
    assert child.returncode == 0, child.stderr[-4000:]
    return [json.loads(line) for line in lines]
