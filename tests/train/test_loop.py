"""The training loop: resumed exactly, the same on one rank and two, in any split, and stopped
where going on is no use.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.cache.index import Index
from deepspec.cache.reader import HiddenCache
from deepspec.errors import ArtifactMismatch, ConfigError, TrainingFailed, TransientError
from deepspec.hidden import stage as capture
from deepspec.train import checkpointing as checkpoints
from deepspec.train import loop, step
from deepspec.train.batches import StepData, sample_seed
from deepspec.train.checkpoint_files import checkpoint_records, checkpoint_steps
from deepspec.train.distributed import World
from deepspec.train.loop import run_train
from deepspec.train.step import StepResult
from tests.conftest import tiny_run

# The total variation is left out: its gradient has a jump where draft and target agree, so that a
# last bit can show as 1e-4.
SMOOTH = ("loss.tv=0", "loss.ce=1")
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def ready(captured: Path, tmp_path: Path) -> Path:
    shutil.copytree(captured, tmp_path / "ready")
    return tmp_path / "ready"


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.store.path(artifact.path("draft/model.safetensors")))


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name in first:
        difference = (first[name] - second[name]).norm() / first[name].norm().clamp_min(1e-12)
        assert difference < 1e-5, name


def test_a_run_that_stopped_after_a_checkpoint_ends_bit_for_bit_like_one_that_did_not(
    ready: Path, tmp_path: Path, monkeypatch
):
    straight = tmp_path / "straight"
    shutil.copytree(ready, straight)
    steps = []
    original = loop.train_step

    def stopping(trainer, data, step, metrics):
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(trainer, data, step, metrics)

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_train(Run(tiny_run(ready)))
    resumed = run_train(Run(tiny_run(ready)))
    assert steps[5] == 4, "the newest checkpoint was written after step 4"
    undisturbed = weights(run_train(Run(tiny_run(straight))))
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in weights(resumed).items())
    assert checkpoint_steps(resumed) == [4, 6]


def test_a_run_that_is_asked_to_stop_finishes_its_step_saves_and_ends_bit_for_bit_like_one_that_was_not(
    ready, tmp_path, monkeypatch
):
    """SIGTERM arrives amid the third step, far from any checkpoint."""
    straight = tmp_path / "straight"
    shutil.copytree(ready, straight)
    original = step.accumulate

    def interrupted(trainer, batch, metrics):
        if (
            trainer.strategy.optimizer.state
            and next(iter(trainer.strategy.optimizer.state.values()))["step"] == 2
        ):
            signal.raise_signal(signal.SIGTERM)
        return original(trainer, batch, metrics)

    rare = "train.checkpoint_steps=100"
    with monkeypatch.context() as patched:
        patched.setattr(step, "accumulate", interrupted)
        with pytest.raises(TransientError, match="asked to stop, and did after step 3"):
            run_train(Run(tiny_run(ready, rare)))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert checkpoint_steps(Run(tiny_run(ready, rare)).artifact("train")) == [3]
    resumed, undisturbed = (
        weights(run_train(Run(tiny_run(ready, rare)))),
        weights(run_train(Run(tiny_run(straight, rare)))),
    )
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in resumed.items())


def test_what_was_trained_on_hidden_states_made_again_since_is_not_sealed_as_if_it_knew_the_new_ones(
    ready: Path, monkeypatch
):
    config = tiny_run(ready, "resources.checks.recapture_every=1000")
    hidden, draft = Run(config).artifact("hidden"), run_train(Run(config))
    states = capture.Capture.states

    def others(self, rows):
        return (
            (row, output._replace(context=1.01 * output.context))
            for row, output in states(self, rows)
        )

    hidden.store.remove(hidden.path("records/00001.json"))
    monkeypatch.setattr(capture.Capture, "states", others)
    capture.run_capture(Run(config))
    sealed = draft.manifest()
    with pytest.raises(
        ArtifactMismatch,
        match=f"step 6 was trained on another version of hidden/{hidden.key.fingerprint}",
    ):
        run_train(Run(config))
    assert draft.manifest() == sealed
    draft.store.remove(draft.path("checkpoints"))
    assert hidden.manifest().digest in run_train(Run(config)).manifest().inputs.values()
    assert draft.manifest().files != sealed.files


def test_the_split_into_micro_batches_leaves_no_trace(ready: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(ready, other)
    sets = ("train.max_steps=20", *SMOOTH)
    config = tiny_run(other, *sets, "resources.memory.batch_tokens=60")
    cache = HiddenCache(Run(config).artifact("hidden"))
    assert len(StepData(cache, config, ALONE).micro_batches(0)) > 2
    assert_close(weights(run_train(Run(tiny_run(ready, *sets)))), weights(run_train(Run(config))))


def test_two_seeds_give_two_orders_and_one_seed_one(captured: Path):
    config = tiny_run(captured)
    cache = HiddenCache(Run(config).artifact("hidden"))
    orders = [
        [
            StepData(cache, tiny_run(captured, f"train.seed={seed}"), ALONE).drawn(step)
            for step in range(3)
        ]
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_every_training_sample_comes_once_an_epoch_and_held_out_ones_never(captured: Path):
    config = tiny_run(captured, "train.global_batch=1", "train.max_steps=null")
    cache = HiddenCache(Run(config).artifact("hidden"))
    data = StepData(cache, config, ALONE)
    epoch = [data.drawn(step)[0].number for step in range(len(data.numbers))]
    held_out = set((cache.index.held_out == 1).nonzero()[0].tolist())
    assert sorted(epoch) == sorted(data.numbers.tolist())
    assert held_out
    assert not held_out & set(epoch)


def test_a_samples_chance_changes_with_epoch_seed_and_sample():
    assert (
        len(
            {
                sample_seed(seed, epoch, sample)
                for seed in (1, 2)
                for epoch in (0, 1)
                for sample in (5, 6)
            }
        )
        == 8
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_samples(ready: Path):
    config = tiny_run(ready, "train.lr=1e20", "train.warmup=0")
    with pytest.raises(TrainingFailed, match="sample ids are in bad_step_"):
        run_train(Run(config))
    artifact = Run(config).artifact("train")
    assert any(name.startswith("bad_step_") for name in artifact.store.names(artifact.folder))


def test_a_cache_without_a_training_sample_is_refused(captured: Path):
    config = tiny_run(captured)
    cache = HiddenCache(Run(config).artifact("hidden"))
    cache.index = Index(*(column[:0] for column in cache.index))
    with pytest.raises(TrainingFailed, match="no training sample"):
        StepData(cache, config, ALONE)


def measured(monkeypatch: pytest.MonkeyPatch, lengths: list[float]) -> None:
    """The acceptance that each checkpoint is found to have, in turn; how it is measured has
    tests of its own.
    """
    found = iter(lengths)
    monkeypatch.setattr(checkpoints, "held_out_acceptance", lambda *_: next(found))


def test_the_best_checkpoint_by_acceptance_is_kept_and_sealed_and_not_the_last(
    ready: Path, monkeypatch, caplog
):
    """Trap D9: the loss falls all the way, acceptance does not."""
    measured(monkeypatch, [1.5, 3.0, 2.0, 2.5, 2.0])
    falling = iter(range(99, 0, -1))
    monkeypatch.setattr(
        step, "StepResult", lambda loss, norm, stop: StepResult(float(next(falling)), norm, stop)
    )
    artifact = run_train(Run(tiny_run(ready, "train.max_steps=10")))
    assert checkpoint_steps(artifact) == [4, 8, 10]
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
    assert checkpoint_steps(artifact)[-1] == 8
    artifact.store.remove(artifact.path("manifest.json"))  # killed before it was sealed
    assert checkpoint_steps(run_train(Run(config)))[-1] == 8


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
    monkeypatch.setattr(checkpoints, "acceptance_numbers", lambda *_: [])
    run_train(Run(tiny_run(ready, "train.max_steps=2", "train.patience=1")))
    assert "there is no held-out sample to measure checkpoints on" in caplog.text


def test_patience_counts_across_a_restart_and_not_what_was_never_measured(ready: Path, monkeypatch):
    """Of old checkpoints only a few are kept: how many were no better is in the record."""
    measured(monkeypatch, [3.0, 2.0, 2.0, 2.0, 2.0])
    config = tiny_run(ready, "train.max_steps=20", "train.patience=4")
    original = loop.train_step

    def stopping(trainer, data, step, metrics):
        result = original(trainer, data, step, metrics)
        return result._replace(stop=step == 4)  # after step 5, which is no checkpoint of its own

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(TransientError, match="asked to stop"):
        run_train(Run(config))
    monkeypatch.setattr(loop, "train_step", original)
    artifact = run_train(Run(config))
    assert checkpoint_steps(artifact)[-1] == 10  # 3.0 at step 2, then 2.0 at 4, 6, 8 and 10


def test_a_checkpoint_that_was_saved_in_a_hurry_is_measured_when_training_goes_on_from_it(
    ready: Path, monkeypatch
):
    measured(monkeypatch, [1.0, 3.0, 2.0])
    original = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *parts: original(*parts)._replace(stop=parts[2] == 3)
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


def test_a_stop_at_the_last_step_does_not_cost_the_last_draft(ready: Path, monkeypatch):
    measured(monkeypatch, [1.0, 1.5, 2.0])
    original = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *parts: original(*parts)._replace(stop=parts[2] == 5)
    )
    artifact = run_train(Run(tiny_run(ready)))
    assert {
        step: record.acceptance_length for step, record in checkpoint_records(artifact).items()
    } == {4: 1.5, 6: 2.0}
