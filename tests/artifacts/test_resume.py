"""Killed at any moment, the same command goes on where the records end, and the sealed digests
are those of a quiet run.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from tests.conftest import REPOSITORY, tiny_run

# All stages in one process, forked from one that has imported them: what a kill interrupts is the
# stages' own work.
RUNS = """
import os, sys, traceback
from pathlib import Path
from tests.conftest import tiny_run
from deepspec.artifacts.run import Run
from deepspec.answers.stage import run_answers
from deepspec.hidden.stage import run_capture
from deepspec.prompts.stage import run_prompts
from deepspec.evaluate.stage import run_evaluate
from deepspec.train.loop import run_train

def work(store):
    run = Run(tiny_run(Path(store)))
    for stage in (run_prompts, run_answers, run_capture, run_train, run_evaluate):
        stage(run)

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work(line.strip())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.setpgid(pid, pid)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
KILLS = 10
STAGES = ("prompts", "answers", "hidden", "train", "evaluate")


@pytest.fixture
def runs() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "DEEPSPEC_LOG": "WARNING"}
    command, pipes = (
        [sys.executable, "-c", RUNS],
        {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
    )
    with subprocess.Popen(command, text=True, cwd=REPOSITORY, env=environment, **pipes) as started:
        yield started


def run(runs: subprocess.Popen[str], store: Path, *, kill_after: float | None = None) -> float:
    """All stages in a process group of its own, killed or to their end; the seconds they took."""
    began = time.monotonic()
    print(store, file=runs.stdin, flush=True)
    pid = int(runs.stdout.readline())
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):  # it came to its end
            os.killpg(pid, signal.SIGKILL)
    code = int(runs.stdout.readline())
    assert code == 0 or (code == -signal.SIGKILL and kill_after is not None)
    return time.monotonic() - began


def committed(store: Path) -> dict[str, int]:
    """Modification times of all records: a shard that is done again would show a new one."""
    return {str(path): path.stat().st_mtime_ns for path in store.glob("*/*/records/*.json")}


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_no_trace_in_the_sealed_digests(
    runs: subprocess.Popen[str], store: Path, tmp_path: Path
):
    quiet = tmp_path / "quiet"
    shutil.copytree(store, quiet)
    seconds = run(runs, quiet)
    chance = random.Random(20)
    for _ in range(KILLS):
        before = committed(store)
        run(runs, store, kill_after=chance.uniform(0, seconds / 3))
        after = committed(store)
        assert all(after.get(path) == made for path, made in before.items()), (
            "a committed shard was made again"
        )
    run(runs, store)
    for stage in STAGES:
        assert stage_status(Run(tiny_run(store)), stage).sealed
    for stage in ("prompts", "answers", "hidden"):
        manifests = [Run(tiny_run(place)).artifact(stage).manifest() for place in (quiet, store)]
        assert len({manifest.digest for manifest in manifests if manifest is not None}) == 1
        assert None not in manifests
