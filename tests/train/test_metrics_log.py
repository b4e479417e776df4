"""TensorBoard's view of a training: every logged step once, whatever happened in between, and
also for who looks on meanwhile.
"""

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.train import loop, metrics_log
from deepspec.train.loop import run_train
from deepspec.train.metrics_log import AXES, write_scalars
from tests.conftest import tiny_run

needs_tensorboard = pytest.mark.skipif(
    not importlib.util.find_spec("tensorboard"), reason="TensorBoard is not installed"
)


@pytest.fixture
def ready(captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loop, "LOG_STEPS", 1)
    shutil.copytree(captured, tmp_path / "ready")
    return tmp_path / "ready"


def folder(artifact: Artifact) -> Path:
    return Path(artifact.store.path(artifact.path(metrics_log.FOLDER)))


def accumulator(artifact: Artifact):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder(artifact)), size_guidance={"scalars": 0})


def read(events) -> dict[tuple[str, int], list[float]]:
    """What TensorBoard shows of each tag at each step."""
    found: dict[tuple[str, int], list[float]] = {}
    for tag in events.Reload().Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def in_lines(artifact: Artifact) -> dict[tuple[str, int], float]:
    lines = [
        json.loads(line)
        for line in artifact.store.read(artifact.path("metrics.jsonl")).decode().splitlines()
    ]
    return {
        (tag, line["step"]): value
        for line in lines
        for tag, value in line.items()
        if tag not in AXES
    }


@needs_tensorboard
def test_a_training_that_was_killed_and_went_on_has_every_logged_step_once(
    ready: Path, monkeypatch: pytest.MonkeyPatch
):
    """It dies after step 5; step 5 is logged, then trained and logged again from the checkpoint
    of step 4.
    """
    config, original, seen = tiny_run(ready), loop.train_step, []

    def dying(trainer, step):
        seen.append(step)
        if len(seen) == 6:
            # the worst it can leave behind
            write_scalars(trainer.artifact, [{"step": 5, "time": 1.0, "loss": 99.0}])
            raise KeyboardInterrupt
        return original(trainer, step)

    monkeypatch.setattr(loop, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run_train(Run(config))
    artifact = run_train(Run(config))
    assert seen == [0, 1, 2, 3, 4, 5, 4, 5]
    wanted, found = in_lines(artifact), read(accumulator(artifact))
    assert {step for _, step in wanted} == set(range(1, 7))
    assert {"loss", "tokens_per_s", "held_out_acceptance_length", "data_wait_share"} <= {
        tag for tag, _ in wanted
    }
    assert found == {key: [pytest.approx(value)] for key, value in wanted.items()}
    assert len(list(folder(artifact).iterdir())) == metrics_log.KEEP


@needs_tensorboard
def test_who_looks_on_sees_new_steps_and_no_step_twice(ready: Path):
    artifact = Run(tiny_run(ready)).artifact("train")
    lines = [{"step": step, "time": float(step), "loss": step / 2} for step in range(1, 9)]
    write_scalars(artifact, lines[:2])
    events = accumulator(artifact)
    for num_lines in (2, 4, 6, 8):
        write_scalars(artifact, lines[:num_lines])
        assert read(events) == {("loss", step): [step / 2] for step in range(1, num_lines + 1)}


def test_without_tensorboard_training_works_and_says_once_how_to_get_it(
    ready: Path, monkeypatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with caplog.at_level(logging.INFO):
        artifact = run_train(Run(tiny_run(ready)))
    assert artifact.manifest() is not None
    assert caplog.text.count("pip install 'deepspec[tensorboard]'") == 1
    assert not folder(artifact).exists()
