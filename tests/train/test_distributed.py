"""The process group: bound to the rank's GPU, left by all together, abandoned after an error."""

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deepspec.artifacts.run import Run
from deepspec.process.machine import free_port
from deepspec.train import distributed
from deepspec.train.distributed import form_group, join_world
from deepspec.train.loop import run_train
from tests.conftest import REPOSITORY, tiny_run

CPU = torch.device("cpu")


def formed(patch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What process groups are formed with; none is, as there is no GPU."""
    found: list[tuple[Any, ...]] = []
    patch.setattr(dist, "is_initialized", lambda: False)
    patch.setattr(dist, "init_process_group", lambda backend, **more: found.append((backend, more)))
    patch.setattr(distributed.atexit, "register", lambda _: None)
    return found


def test_nccl_is_bound_to_the_gpu_of_the_rank(monkeypatch: pytest.MonkeyPatch):
    """Without it a barrier guesses the device, with a warning, and can hang on the wrong one."""
    gpu = torch.device("cuda", 3)
    monkeypatch.setattr(distributed, "choose_device", lambda *_, **__: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    found, timeout = formed(monkeypatch), timedelta(seconds=1)
    assert join_world("auto", dtype="bfloat16", timeout=timeout) == (3, 4, gpu)
    form_group(CPU, timeout=timeout)
    assert found == [
        ("nccl", {"device_id": gpu, "timeout": timeout}),
        ("gloo", {"device_id": None, "timeout": timeout}),
    ]


def test_another_training_in_the_same_process_is_none_the_worse(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """DeepSpeed finds a second group of its process unknown."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    shutil.copytree(captured, tmp_path / "store")
    for seed in (1, 2):
        sets = ("train.strategy=deepspeed", "train.max_steps=1", f"train.seed={seed}")
        assert run_train(Run(tiny_run(tmp_path / "store", *sets))).manifest() is not None


RANK = """
import atexit, sys
from datetime import timedelta
import torch.distributed as dist

atexit.register(lambda: print("formed at the very end:", dist.is_initialized()))
from deepspec.train.distributed import join_world, leaving_group

@leaving_group()
def work():
    world = join_world("cpu", dtype="float32", timeout=timedelta(seconds=60))
    world.wait()
    if sys.argv[1:] == [str(world.rank)]:
        raise ValueError("an error of its own")
    world.wait()

try:
    work()
finally:
    print("formed after the work:", dist.is_initialized())
"""


@pytest.mark.parametrize("failing", [None, 1])
def test_ranks_leave_their_group_on_every_way_out(failing: int | None):
    """An error ends both at once: the one that waits does not wait for its timeout."""
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-c", RANK, *([] if failing is None else [str(failing)])]
    ranks = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [rank.communicate(timeout=50) for rank in ranks]
    after_work = failing is not None
    for rank, (out, err) in zip(ranks, ends, strict=True):
        assert rank.returncode == after_work, err
        assert out.splitlines() == [
            f"formed after the work: {after_work}",
            "formed at the very end: False",
        ]
    assert ("ValueError: an error of its own" in ends[1][1]) is after_work
