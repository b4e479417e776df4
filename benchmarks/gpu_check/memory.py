"""Out of memory on purpose: a verb that has room for its weights and for no pass through them ends
with one message and an exit code.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.demo import ALL, Verbs, dspark_demo
from benchmarks.gpu_check.section import Bench
from deepspec.artifacts.status import stage_status

BESIDE_WEIGHTS = 8_000_000  # bytes; cuBLAS alone takes more for its work on a large GPU
# The number of bytes that PyTorch may take, then a verb's own words.
LIMITED = """
import sys
import torch
limit = int(sys.argv.pop(1))
torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
from deepspec.__main__ import main
main()
"""
# PyTorch cannot limit its memory on a CPU: there every matrix product raises what a GPU would.
REHEARSED = """
import sys
import torch
limit = int(sys.argv.pop(1))
def no_room(*_):
    raise torch.OutOfMemoryError(f"CUDA out of memory (rehearsed, {limit} bytes)")
torch.nn.Linear.forward = no_room
from deepspec.__main__ import main
main()
"""


def check(bench: Bench) -> None:
    with bench.part("a draft to evaluate"):
        verbs = dspark_demo(bench)
        is_there = stage_status(verbs.run, "train").sealed  # left by the section `demo`
        if not (is_there or verbs.do(*ALL[:5])):
            return
        target, draft = (largest(verbs.store, part) for part in ("target", "draft"))
        fresh = {  # another artifact of the stage, and the bytes of its weights
            "answers": ("answers.seed=1", target),
            "train": ("train.seed=1", 2 * draft),
            "evaluate": ("evaluate.seed=1", target + draft),
        }
        for verb, (changed, num_bytes) in fresh.items():
            with bench.part(f"{verb} without memory"):
                without(bench, dspark_demo(bench, changed), verb, num_bytes)


def largest(store: Path, part: str) -> int:
    return max(path.stat().st_size for path in store.rglob(f"{part}/*.safetensors"))


def without(bench: Bench, verbs: Verbs, verb: str, num_bytes: int) -> None:
    words: Sequence[str] = verbs.command(verb)[3:]
    code = REHEARSED if bench.rehearse else LIMITED
    ended = subprocess.run(
        [sys.executable, "-c", code, str(num_bytes + BESIDE_WEIGHTS), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    print(ended.stderr, flush=True)
    error = ended.stderr.rpartition("error: ")[2].strip().partition("\n")[0]
    ok = ended.returncode > 0 and error and "Traceback" not in ended.stderr
    what = f"{verb} without memory: one message, no stack trace"
    bench.findings.check(what, ok, f"exit code {ended.returncode}: {error}")
