"""Two ranks under DeepSpeed end where ddp does, from whatever checkpoint, with unequal and with
no work.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.process.machine import free_port
from deepspec.train.checkpoint_files import checkpoint_records
from deepspec.train.loop import run_train
from tests.conftest import REPOSITORY, TINY, tiny_run
from tests.train.test_loop import SMOOTH, weights

# Equally many samples in unequally many micro-batches.
RUN = [
    "train.max_steps=20",
    "train.checkpoint_steps=10",
    "train.global_batch=6",
    "resources.memory.batch_tokens=60",
    *SMOOTH,
]
ZERO = "train.strategy=deepspeed"

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")


def of_deepspeed() -> list[str]:
    """What `deepspeed --hostfile` starts on a host by ssh."""
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    return [
        "deepspeed.launcher.launch",
        f"--world_info={hosts}",
        f"--master_port={free_port()}",
        "--module",
    ]


# The door itself, with steps that are dealt to the first rank alone.
ONE_SIDED = """
import copy
from deepspec.__main__ import main
from deepspec.train.batches import StepData

dealt = StepData.micro_batches

def to_the_first(self, step):
    alone = copy.copy(self)  # not itself changed: two threads read from it
    alone.world = self.world._replace(rank=0, size=1)
    return dealt(alone, step) if self.world.rank == 0 else []

StepData.micro_batches = to_the_first
main()
"""


def copy(store: Path, to: Path) -> Path:
    shutil.copytree(store, to)
    return to


def two_ranks(
    store: Path,
    *overrides: str,
    launcher: Sequence[str] = TORCHRUN,
    door: Sequence[str] = ("deepspec",),
) -> str:
    """Train on two ranks; what they said on standard error."""
    sets = [
        part
        for override in [*TINY, "resources.devices.type=cpu", *overrides]
        for part in ("--set", override)
    ]
    command = [
        sys.executable,
        "-m",
        *launcher,
        *door,
        "train",
        "demo",
        "--store",
        str(store),
        *sets,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DEEPSPEC_EVENTS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if launcher == TORCHRUN:  # the other one logs there itself
        assert all(line.startswith("{") for line in done.stdout.splitlines()), (
            "standard output is for events"
        )
    return done.stderr


def assert_close(first: Artifact, second: Artifact, within: float = 1e-4) -> None:
    ours, theirs = weights(first), weights(second)
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= within * tensor.norm().clamp_min(1e-12), name


def back_to(step: int, artifact: Artifact) -> None:
    """As if it had been killed after that step's checkpoint."""
    for later in list(checkpoint_records(artifact)):
        if later > step:
            artifact.store.remove(artifact.path(f"checkpoints/{later:08d}"))
    artifact.store.remove(artifact.path("manifest.json"))
    assert list(checkpoint_records(artifact))[-1] == step


@pytest.fixture(scope="module")
def ddp(captured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which one rank has trained undisturbed."""
    store = copy(captured, tmp_path_factory.mktemp("ddp") / "store")
    run_train(Run(tiny_run(store, *RUN)))
    return store


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_ends_where_ddp_does_and_ddp_goes_on_from_its_checkpoint(
    captured: Path, ddp: Path, tmp_path: Path, stage: int
):
    store = copy(captured, tmp_path / "store")
    said = two_ranks(store, *RUN, ZERO, f"resources.memory.zero_stage={stage}")
    artifact, wanted = (
        Run(tiny_run(store, *RUN)).artifact("train"),
        Run(tiny_run(ddp, *RUN)).artifact("train"),
    )
    assert_close(artifact, wanted)
    assert said.count("deepspeed.json: {") == 1
    assert "Warning" not in said
    back_to(10, artifact)
    assert_close(run_train(Run(tiny_run(store, *RUN))), wanted)


@pytest.mark.slow
def test_two_ranks_go_on_from_a_checkpoint_of_one_under_another_strategy(ddp: Path, tmp_path: Path):
    store = copy(ddp, tmp_path / "store")
    artifact = Run(tiny_run(store, *RUN)).artifact("train")
    back_to(10, artifact)
    said = two_ranks(
        store,
        *RUN,
        ZERO,
        "resources.memory.zero_stage=3",
        "resources.memory.offload=all",
        launcher=of_deepspeed(),
    )
    assert "steps=10 of 20" in said
    assert_close(artifact, Run(tiny_run(ddp, *RUN)).artifact("train"))


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed"])
def test_a_rank_that_never_has_a_sample_is_not_waited_for(
    captured: Path, tmp_path: Path, strategy: str
):
    """Trap D3; the first rank gets all samples of every step, and the second one none."""
    run = ["train.max_steps=4", *SMOOTH]
    alone, store = copy(captured, tmp_path / "alone"), copy(captured, tmp_path / "store")
    (tmp_path / "one_sided.py").write_text(ONE_SIDED)
    launcher = (*TORCHRUN[:-1], "--no-python")
    door = (sys.executable, str(tmp_path / "one_sided.py"))
    two_ranks(
        store,
        *run,
        f"train.strategy={strategy}",
        "resources.memory.zero_stage=3",
        launcher=launcher,
        door=door,
    )
    assert_close(
        run_train(Run(tiny_run(alone, *run))), Run(tiny_run(store, *run)).artifact("train")
    )
