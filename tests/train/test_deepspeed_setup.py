"""DeepSpeed's configuration, and its absence."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepspec.errors import ConfigError
from deepspec.train.deepspeed_setup import derived_config
from tests.conftest import REPOSITORY, tiny_run

ZERO = {
    stage: ["train.strategy=deepspeed", f"resources.memory.zero_stage={stage}"]
    for stage in (1, 2, 3)
}


BFLOAT16 = "train.compute_dtype=bfloat16"


def test_deepspeeds_configuration_follows_from_the_runs(tmp_path: Path):
    overrides = [
        "train.lr=0.5",
        "train.weight_decay=0.1",
        "train.clip=0.7",
        BFLOAT16,
        "resources.memory.offload=all",
        *ZERO[3],
    ]
    config = tiny_run(tmp_path, *overrides)
    derived = derived_config(
        config, hidden_size=32, num_parameters=1001, device=torch.device("cuda")
    )
    assert (
        derived["optimizer"]["params"] | {"lr": 0.5, "weight_decay": 0.1, "betas": [0.9, 0.999]}
        == derived["optimizer"]["params"]
    )
    assert derived["gradient_clipping"] == 0.7
    assert derived["bf16"] == {"enabled": True}
    host = {"device": "cpu", "pin_memory": True}
    assert derived["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": host,
        "offload_param": host,
        "stage3_param_persistence_threshold": 32,
        "reduce_bucket_size": 1002,
        "allgather_bucket_size": 1002,
    }


def test_parameters_are_offloaded_only_where_they_are_dealt_out(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"needs resources\.memory\.zero_stage 3"):
        tiny_run(tmp_path, "resources.memory.offload=all", "resources.memory.zero_stage=2")


def test_deepspeed_is_loaded_for_nobody_else_and_its_absence_is_told_before_anything_is_read(
    captured: Path,
):
    code = """
import sys
from pathlib import Path
from deepspec.artifacts.run import Run
from deepspec.errors import ConfigError
from deepspec.train.loop import run_train
from tests.conftest import tiny_run
assert "deepspeed" not in sys.modules
sys.modules["deepspeed"] = None  # as if it were not installed
try:
    run_train(Run(tiny_run(Path(sys.argv[1]), "train.strategy=deepspeed")))
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(captured)],
        check=True,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert "pip install '.[deepspeed]'" in done.stdout
    assert not (captured / "train").exists()
