"""Killed at any moment, the same command goes on where the records end, and the sealed digests are those of a quiet run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspec.lineage import artifact_of
from deepspec.stages import stage_status
from tests.conftest import REPOSITORY, tiny_run

# All stages in one process: what a kill interrupts is the stages' own work, not the start of six interpreters.
PIPELINE = """
import sys
from pathlib import Path
from tests.conftest import tiny_run
from deepspec.data.answers import run_answers
from deepspec.data.capture import run_capture
from deepspec.data.prompts import run_prompts
from deepspec.eval.run import run_evaluate
from deepspec.train.loop import run_train
config = tiny_run(Path(sys.argv[1]))
print("ready", flush=True)
for stage in (run_prompts, run_answers, run_capture, run_train, run_evaluate):
    stage(config)
print("finished", flush=True)
"""
KILLS = 10
STAGES = ("prompts", "answers", "hidden", "train", "evaluate")


def start(store: Path) -> subprocess.Popen[str]:
    """A run in its own process group; returns once its imports are done."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DEEPSPEC_LOG": "WARNING"}
    run = subprocess.Popen(
        [sys.executable, "-c", PIPELINE, str(store)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment,
        start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    return run


def finish(store: Path) -> float:
    run = start(store)
    began = time.monotonic()
    assert run.wait(timeout=120) == 0
    return time.monotonic() - began


def committed(store: Path) -> dict[str, int]:
    """Modification times of all records: a shard that is done again would show a new one."""
    return {str(path): path.stat().st_mtime_ns for path in store.glob("*/*/records/*.json")}


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace_in_the_sealed_digests(store: Path, tmp_path: Path):
    quiet = tmp_path / "quiet"
    shutil.copytree(store, quiet)
    seconds = finish(quiet)
    chance = random.Random(20)
    for _ in range(KILLS):
        before = committed(store)
        run = start(store)
        time.sleep(chance.uniform(0, seconds / 3))
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        after = committed(store)
        assert all(after.get(path) == made for path, made in before.items()), "a committed shard was made again"
    finish(store)
    for stage in STAGES:
        assert stage_status(tiny_run(store), stage).sealed
    for stage in ("prompts", "answers", "hidden"):
        manifests = [artifact_of(tiny_run(place), stage).manifest() for place in (quiet, store)]
        assert len({manifest.digest for manifest in manifests if manifest is not None}) == 1
        assert None not in manifests
