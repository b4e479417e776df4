"""Stages that cannot fit a GPU are refused before a weight is read, with what would fit."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deepspec.answers.local_engine import TransformersEngine
from deepspec.artifacts.run import Run
from deepspec.config.recipes import load_run
from deepspec.errors import ConfigError
from deepspec.hidden.stage import load_capture_target
from deepspec.model.memory import GPU_SHARE
from deepspec.target import gpu_room
from deepspec.target.gpu_room import fitting_rows, fitting_training, require_room_for
from deepspec.target.peak_memory import StageMemory
from deepspec.train import loop
from deepspec.train.distributed import World
from tests.conftest import tiny_run
from tests.target.recipe_targets import TARGETS

GPU = torch.device("cuda", 0)
GB = int(1e9)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A GPU with so many free bytes; none of the target's weights can be read."""

    def with_free(num_bytes: int) -> None:
        def read(*_: Any, **__: Any) -> None:
            raise AssertionError("weights were read")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
        monkeypatch.setattr(gpu_room, "choose_device", lambda *_, **__: GPU)
        monkeypatch.setattr(gpu_room, "free_bytes", lambda _: num_bytes)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a small GPU")

    return with_free


def stages_of(recipe: str, *sets: str) -> StageMemory:
    return StageMemory(load_run(recipe, sets, store="none"), TARGETS[recipe.partition("-")[2]])


@pytest.mark.parametrize(
    ("stage", "begin"),
    [("answers", TransformersEngine), ("hidden", lambda run: load_capture_target(run, num_gpus=1))],
)
def test_a_target_without_room_is_refused_before_its_weights_are_read(
    gpu: Callable[[int], None], demo_store: Path, stage: str, begin: Callable[[Run], Any]
) -> None:
    gpu(100_000)
    with pytest.raises(
        ConfigError, match=f"{stage} needs .* 100 kB are free on a small GPU"
    ) as why:
        begin(Run(tiny_run(demo_store)))
    assert "gpus_per_lane" in why.value.fix
    gpu(GB)
    with pytest.raises(AssertionError, match="weights were read"):
        begin(Run(tiny_run(demo_store)))
    gpu(100_000)
    with pytest.raises(AssertionError, match="weights were read"):  # at the user's own risk
        begin(Run(tiny_run(demo_store, "resources.checks.gpu_memory=warn")))


def test_a_training_without_room_is_refused_before_anything_is_read(
    gpu: Callable[[int], None], captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(captured, tmp_path / "store")
    run = Run(tiny_run(tmp_path / "store", "resources.training.compile=false"))
    gpu(100_000)
    monkeypatch.setattr(loop, "join_world", lambda *_, **__: World(0, 1, GPU))
    for name in ("open_source", "make_draft"):
        monkeypatch.setattr(loop, name, lambda *_, **__: pytest.fail("something was read"))
    with pytest.raises(ConfigError, match="stage train needs"):
        loop.run_train(run)


def test_a_cpu_refuses_nothing(demo_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_room, "free_bytes", lambda _: 0)
    run = Run(tiny_run(demo_store, "resources.devices.type=cpu"))
    assert TransformersEngine(run).target.device.type == "cpu"
    target = TARGETS["qwen3-14b"]
    config = load_run("dspark-qwen3-14b", store="none")
    require_room_for(config, "train", torch.device("cpu"), target=target)


@pytest.mark.parametrize("gigabytes", [24, 48, 80])
@pytest.mark.parametrize("recipe", ["dspark-qwen3-8b", "eagle3-qwen3-14b", "dflash-gemma4-12b"])
def test_what_the_error_recommends_is_accepted(
    gpu: Callable[[int], None], recipe: str, gigabytes: int
) -> None:
    target = TARGETS[recipe.partition("-")[2]]
    gpu(gigabytes * GB)
    large = "resources.memory.batch_tokens=200000", "resources.memory.batch_slots=800000"
    config = load_run(recipe, large, store="none")
    with pytest.raises(ConfigError) as why:
        require_room_for(config, "train", GPU, target=target)
    settings = [word for word in why.value.fix.split() if word.startswith("resources.memory.")]
    if "no resources.memory.batch_tokens fits" in why.value.fix:
        assert gigabytes == 24 and recipe != "eagle3-qwen3-14b"
        assert "use a GPU with" in why.value.fix and "train.strategy=deepspeed" in why.value.fix
        return
    assert settings
    require_room_for(load_run(recipe, settings, store="none"), "train", GPU, target=target)


def test_layers_are_computed_again_only_where_nothing_fits_otherwise() -> None:
    stages = stages_of("eagle3-qwen3-14b")
    large, small = (
        fitting_training(stages, GPU_SHARE * gigabytes * GB, ranks=1) for gigabytes in (80, 24)
    )
    assert large and small
    assert (large.batch_tokens, large.recompute) == (8192, False)
    assert small.recompute
    assert small.num_bytes <= GPU_SHARE * 24 * GB
    assert fitting_training(stages, 8 * GB, ranks=1) is None


def test_rows_are_the_most_that_fit() -> None:
    stages = stages_of("dspark-qwen3-4b")
    usable = GPU_SHARE * 80 * GB
    rows = fitting_rows(stages.answers, usable)
    assert stages.answers(rows) <= usable < stages.answers(rows + 1)
    assert fitting_rows(stages.answers, 1 * GB) == 0


def test_several_gpus_hold_a_target_that_one_does_not(gpu: Callable[[int], None]) -> None:
    target, spread = TARGETS["qwen3-14b"], "resources.devices.gpus_per_lane=2"
    gpu(24 * GB)
    with pytest.raises(ConfigError):
        require_room_for(load_run("qwen3-14b", store="none"), "hidden", GPU, target=target)
    require_room_for(load_run("qwen3-14b", [spread], store="none"), "hidden", GPU, target=target)


def test_a_family_without_arithmetic_is_not_refused(
    gpu: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    gpu(0)
    with caplog.at_level(logging.WARNING):
        config = load_run("qwen3-4b", store="none")
        require_room_for(config, "answers", GPU, target={"model_type": "llama"})
    assert not caplog.records
