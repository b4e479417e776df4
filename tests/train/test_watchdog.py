"""A step that never ends: the process says where it stood and leaves with "try again"."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deepspec.errors import EXIT_TRANSIENT
from deepspec.process.events import silent
from deepspec.train.watchdog import watchdog
from tests.conftest import REPOSITORY, TINY

# The door itself, with a third step that sleeps.
STALLED = """
import sys, time
from deepspec.__main__ import main
from deepspec.train import loop

original = loop.train_step

def sleeping_step(trainer, step):
    if step == 2:
        time.sleep(600)
    return original(trainer, step)

loop.train_step = sleeping_step
main()
"""


def stalled(store: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    sets = [
        part
        for override in [*TINY, "resources.retries.stall_minutes=0.05"]
        for part in ("--set", override)
    ]
    command = [sys.executable, "-c", STALLED, "train", "demo", "--store", str(store), *sets]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
    )


@pytest.mark.slow
def test_a_stalled_step_dumps_the_stacks_and_ends_with_try_again(captured: Path, tmp_path: Path):
    shutil.copytree(captured, tmp_path / "store")
    done = stalled(tmp_path / "store", DEEPSPEC_EVENTS="1")
    assert done.returncode == EXIT_TRANSIENT, done.stderr
    event = json.loads(done.stdout.splitlines()[-1])
    assert (event["event"], event["error"], event["transient"]) == ("error", "TransientError", True)
    assert "no training step was finished for 0.05 minutes" in event["what"]
    assert "in sleeping_step" in done.stderr
    assert event["what"] in done.stderr, "by hand, the log is all that there is"


def test_a_process_that_is_heard_of_lives_and_leaving_the_block_ends_the_watch():
    with watchdog(0.3, silent) as beat:
        for _ in range(5):
            time.sleep(0.1)
            beat()
    time.sleep(0.4)
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
