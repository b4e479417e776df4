"""A real vLLM for the tests marked `engine`: its build for the CPU, in an environment of its own.

`make engine` installs it (3.5 GB); where it is absent those tests skip and say so.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deepspec.process.machine import LOOPBACK, free_port

FOLDER = Path(os.environ.get("DEEPSPEC_TEST_ENGINE") or Path(sys.prefix) / "engine")
PYTHON, PROGRAM = FOLDER / "bin" / "python", FOLDER / "bin" / "vllm"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
# In addition where a draft is loaded whose runner needs Triton: DSpark's, and what goes as one.
INTERPRETED = {"PYTHONPATH": str(FOLDER / "interpreter"), "TRITON_INTERPRET": "1"}
# As `resources.servers.start_command`; float32 and no compilation, so that tokens can be compared.
COMMAND = (
    *(str(PROGRAM), "serve", "{model}", "--served-model-name", "{name}"),
    *("--host", "{host}", "--port", "{port}", "--dtype", "float32", "--enforce-eager"),
)
UP_WITHIN_S = 240

needs_vllm = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not PROGRAM.is_file(), reason=f"no vLLM in {FOLDER} (`make engine` installs it)"
    ),
]


@contextlib.contextmanager
def serving(
    model: Path, log: Path, *options: str, name: str = "target", **variables: str
) -> Iterator[str]:
    """A server of `model`, up for the length of the block; its URL without a path."""
    port = str(free_port())
    values = {"{model}": str(model), "{name}": name, "{host}": LOOPBACK, "{port}": port}
    command = [values.get(word, word) for word in COMMAND]
    supervisor = [sys.executable, "-m", "deepspec.process.supervisor", "10"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*supervisor, *command, *options],
            env={**os.environ, **ENVIRONMENT, **variables},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
    url, limit = f"http://{LOOPBACK}:{port}", time.monotonic() + UP_WITHIN_S
    try:
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > limit:
                pytest.fail(f"vLLM is not up: {log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.stdin.close()
        process.wait(60)


def _is_healthy(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success
    return False
