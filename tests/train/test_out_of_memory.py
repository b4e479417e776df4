"""A step that does not fit names what to lower; any other error passes as it is."""

import shutil
from pathlib import Path

import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.errors import TrainingFailed
from deepspec.train import step
from deepspec.train.loop import run_train
from deepspec.train.out_of_memory import explain_oom
from tests.conftest import tiny_run


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 9 bytes."
        ),
    ],
)
def test_a_step_that_does_not_fit_names_the_knobs_and_their_values(
    error: Exception, captured: Path, tmp_path: Path, monkeypatch
):
    shutil.copytree(captured, tmp_path / "store")

    def too_large(*_: object) -> None:
        raise error

    monkeypatch.setattr(step, "accumulate", too_large)
    with pytest.raises(TrainingFailed, match="does not fit into memory") as caught:
        run_train(Run(tiny_run(tmp_path / "store", "resources.memory.batch_tokens=4321")))
    assert str(error).splitlines()[0] in caught.value.what
    for knob in (
        "resources.memory.batch_tokens (now 4321)",
        "resources.memory.batch_slots (now 17284)",
        "draft.num_anchors (now 4)",
        "draft.block_size (now 7)",
    ):
        assert knob in caught.value.fix


def test_a_draft_without_anchors_names_what_it_has(tmp_path: Path):
    config = tiny_run(tmp_path, "target.layer_ids=[0, 1, 2]", recipe="eagle3-demo")
    with (
        pytest.raises(TrainingFailed) as caught,
        explain_oom(config.draft, config.resources.memory),
    ):
        raise RuntimeError("out of memory")
    assert "draft.ttt_length (now 7)" in caught.value.fix
    assert "num_anchors" not in caught.value.fix


def test_any_other_error_passes(tmp_path: Path):
    config = tiny_run(tmp_path)
    with (
        pytest.raises(RuntimeError, match="shapes do not match"),
        explain_oom(config.draft, config.resources.memory),
    ):
        raise RuntimeError("shapes do not match")
