"""The checkpoint that counts is the one accepted furthest, measured once, also over restarts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.errors import ConfigError, TransientError
from deepspec.train import checkpoint_clock, checkpointing, loop, step
from deepspec.train.checkpoint_files import checkpoint_records
from deepspec.train.loop import run_train
from deepspec.train.step import StepResult
from tests.conftest import tiny_run
from tests.train.test_loop import weights


@pytest.fixture
def ready(captured: Path, tmp_path: Path) -> Path:
    shutil.copytree(captured, tmp_path / "ready")
    return tmp_path / "ready"


def measured(monkeypatch: pytest.MonkeyPatch, lengths: list[float]) -> None:
    """The acceptance that each checkpoint is found to have, in turn; how it is measured has
    tests of its own.
    """
    found = iter(lengths)
    monkeypatch.setattr(checkpointing, "held_out_acceptance", lambda *_: next(found))


def test_the_best_checkpoint_by_acceptance_is_kept_and_sealed_and_not_the_last(
    ready: Path, monkeypatch, caplog
):
    """Trap D9: the loss falls all the way, acceptance does not."""
    measured(monkeypatch, [1.5, 3.0, 2.0, 2.5, 2.0])
    falling = iter(range(99, 0, -1))
    monkeypatch.setattr(
        step, "StepResult", lambda loss, *rest: StepResult(float(next(falling)), *rest)
    )
    artifact = run_train(Run(tiny_run(ready, "train.max_steps=10")))
    assert list(checkpoint_records(artifact)) == [4, 8, 10]
    best = load_file(artifact.store.path(artifact.path("checkpoints/00000004/model.safetensors")))
    assert all(torch.equal(best[name], tensor) for name, tensor in weights(artifact).items())
    assert "the loss falls" in caplog.text and "step 4 stays the best" in caplog.text
    lines = [
        json.loads(line)
        for line in artifact.store.read(artifact.path("metrics.jsonl")).decode().splitlines()
    ]
    assert [
        line["held_out_acceptance_length"] for line in lines if "held_out_acceptance_length" in line
    ] == [1.5, 3.0, 2.0, 2.5, 2.0]


def test_training_ends_early_where_acceptance_gets_no_better_and_stays_ended(
    ready: Path, monkeypatch
):
    measured(monkeypatch, [1.5, 3.0, 2.0, 2.5])
    config = tiny_run(ready, "train.max_steps=20", "train.patience=2")
    artifact = run_train(Run(config))
    assert list(checkpoint_records(artifact))[-1] == 8
    artifact.store.remove(artifact.path("manifest.json"))  # killed before it was sealed
    assert list(checkpoint_records(run_train(Run(config))))[-1] == 8


def test_without_samples_to_measure_the_last_checkpoint_counts(ready: Path):
    config = tiny_run(ready, "train.acceptance_samples=0")
    artifact = run_train(Run(config))
    assert artifact.manifest() is not None
    with pytest.raises(ConfigError, match="patience needs"):
        tiny_run(ready, "train.acceptance_samples=0", "train.patience=1")
    with pytest.raises(ConfigError, match=r"patience needs prompts\.held_out"):
        tiny_run(ready, "prompts.held_out=0", "train.patience=1")


def test_a_cache_without_held_out_samples_is_trained_on_and_the_lack_is_told(
    ready: Path, monkeypatch, caplog
):
    monkeypatch.setattr(checkpointing, "acceptance_numbers", lambda *_: [])
    run_train(Run(tiny_run(ready, "train.max_steps=2", "train.patience=1")))
    assert "there is no held-out sample to measure checkpoints on" in caplog.text


def test_patience_counts_across_a_restart_and_not_what_was_never_measured(ready: Path, monkeypatch):
    """Of old checkpoints only a few are kept: how many were no better is in the record."""
    measured(monkeypatch, [3.0, 2.0, 2.0, 2.0, 2.0])
    config = tiny_run(ready, "train.max_steps=20", "train.patience=4")
    original = loop.train_step

    def stopping(trainer, step):
        result = original(trainer, step)
        return result._replace(stop=step == 4)  # after step 5, which is no checkpoint of its own

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(TransientError, match="asked to stop"):
        run_train(Run(config))
    monkeypatch.setattr(loop, "train_step", original)
    artifact = run_train(Run(config))
    assert list(checkpoint_records(artifact))[-1] == 10  # 3.0 at step 2, then 2.0 at 4, 6, 8 and 10


def test_a_checkpoint_that_was_saved_in_a_hurry_is_measured_when_training_goes_on_from_it(
    ready: Path, monkeypatch
):
    measured(monkeypatch, [1.0, 3.0, 2.0])
    original = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *parts: original(*parts)._replace(stop=parts[1] == 3)
    )
    with pytest.raises(TransientError, match="asked to stop"):
        run_train(Run(tiny_run(ready)))
    monkeypatch.setattr(loop, "train_step", original)
    artifact = run_train(Run(tiny_run(ready)))
    assert [record.acceptance_length for record in checkpoint_records(artifact).values()] == [
        3.0,
        2.0,
    ]
    lines = [
        json.loads(line)
        for line in artifact.store.read(artifact.path("metrics.jsonl")).decode().splitlines()
    ]
    assert [
        line["held_out_acceptance_length"] for line in lines if "held_out_acceptance_length" in line
    ] == [1.0, 3.0, 2.0]


def test_checkpoints_by_time_change_no_draft_and_are_not_measured(ready: Path, tmp_path: Path):
    """Six hours of a run that was preempted went with it: 500 steps took that long."""
    shutil.copytree(ready, tmp_path / "timed")
    artifact = run_train(Run(tiny_run(ready)))
    timed = run_train(
        Run(tiny_run(tmp_path / "timed", "resources.training.checkpoint_minutes=1e-9"))
    )
    assert list(checkpoint_records(artifact)) == [4, 6]
    found = checkpoint_records(timed)
    assert set(found) >= {5, 6} and found[5].acceptance_length is None
    assert found[5].files and found[6].acceptance_length is not None
    for name, tensor in weights(artifact).items():
        assert torch.equal(weights(timed)[name], tensor)
    assert measurements(timed) == measurements(artifact) and len(measurements(timed)) == 3


def measurements(artifact: Artifact) -> list[float]:
    lines = map(json.loads, artifact.read("metrics.jsonl").decode().splitlines())
    name = "held_out_acceptance_length"
    return [line[name] for line in lines if name in line]


def test_a_checkpoint_is_due_so_long_after_the_last_one_whichever_made_it(
    ready: Path, monkeypatch: pytest.MonkeyPatch
):
    """A step a minute, a checkpoint every four steps and every three minutes."""
    original, save, saved = loop.train_step, checkpointing.save_checkpoint, list[int]()
    now = [0.0]
    monkeypatch.setattr(checkpoint_clock.time, "perf_counter", lambda: now[0])

    def step_of_a_minute(trainer, step):
        now[0] += 60
        return original(trainer, step)

    def saving(*parts, record, **more):
        saved.append(record.step)
        save(*parts, record=record, **more)

    monkeypatch.setattr(loop, "train_step", step_of_a_minute)
    monkeypatch.setattr(checkpointing, "save_checkpoint", saving)
    sets = ("train.max_steps=10", "train.epochs=10", "train.checkpoint_steps=4")
    run_train(Run(tiny_run(ready, *sets, "resources.training.checkpoint_minutes=3")))
    assert saved == [3, 4, 7, 8, 10]


def test_a_stop_at_the_last_step_does_not_cost_the_last_draft(ready: Path, monkeypatch):
    measured(monkeypatch, [1.0, 1.5, 2.0])
    original = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *parts: original(*parts)._replace(stop=parts[1] == 5)
    )
    artifact = run_train(Run(tiny_run(ready)))
    assert {
        step: record.acceptance_length for step, record in checkpoint_records(artifact).items()
    } == {4: 1.5, 6: 2.0}
