"""Capture on two lanes, killed twenty times: the cache that comes out is the one of an undisturbed
run, bit for bit.

The lanes are forked from a process that has loaded the target, so a kill meets the work itself and
not an interpreter that is starting up. At 10,000 shards with a worker dying every minute the same
holds: what is committed stays, and each death costs the shards in flight.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from tests.conftest import REPOSITORY, tiny_run

LANES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.conftest import tiny_run
from deepspec.hidden import stage as capture
from deepspec.target.chat import load_chat, target_folder
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status

run = Run(tiny_run(Path(sys.argv[1]), *sys.argv[3:]))
chat = load_chat(run)
target = capture.load_target(run.config.target, folder=target_folder(run))
capture.load_chat, capture.load_target = lambda *_: chat, lambda *_, **__: target
chance = random.Random(7)
lanes = {}  # pid: number
kills = 0

def lane(number):
    pid = os.fork()
    if pid == 0:
        try:
            capture.run_capture(run, shards=[shard for shard in range(6) if shard % 2 == number])
        finally:
            os._exit(0)
    lanes[pid] = number

def wait(pid):
    os.waitpid(pid, 0)
    return lanes.pop(pid)

began = time.monotonic()
lane(0), lane(1)
while kills < 20:
    time.sleep(chance.uniform(0.0, float(sys.argv[2])))
    victim = chance.choice(list(lanes))
    os.kill(victim, signal.SIGKILL)
    number = wait(victim)
    kills += 1
    # captured between two kills: begin anew with half of it lost
    if not stage_status(run, "hidden").missing:
        for path in Path(sys.argv[1]).glob("hidden/*/records/0000[1-4].json"):
            path.unlink()
    lane(number)
for pid in list(lanes):
    wait(pid)
capture.run_capture(run)
print("killed", kills, time.monotonic() - began)
"""


@pytest.mark.slow
def test_twenty_kills_on_two_lanes_leave_the_cache_of_an_undisturbed_run(
    captured: Path, tmp_path: Path
):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    for store in (quiet, killed):
        shutil.copytree(captured, store)
        shutil.rmtree(store / "hidden")
    overrides = ["hidden.codec=int8"]
    seconds = "0"
    for store, script in ((quiet, LANES.replace("kills < 20", "False")), (killed, LANES)):
        command = [sys.executable, "-c", script, str(store), seconds, *overrides]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=250)
        assert done.returncode == 0, done.stderr
        # how long both lanes take undisturbed: a kill comes at any moment of that
        _, kills, seconds = done.stdout.split()
    assert kills == "20"
    manifests = [
        Run(tiny_run(store, *overrides)).artifact("hidden").manifest() for store in (quiet, killed)
    ]
    assert manifests[0] is not None
    assert manifests[1] is not None
    assert manifests[0].digest == manifests[1].digest
    assert stage_status(Run(tiny_run(killed, *overrides)), "hidden").sealed
