"""The training loop: resumed exactly, the same on one rank and two, in any split, and stopped
where going on is no use.
"""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.cache.reader import HiddenCache
from deepspec.errors import ArtifactMismatch, TrainingFailed, TransientError
from deepspec.hidden.capture import Capture
from deepspec.hidden.stage import run_capture
from deepspec.train import loop, step
from deepspec.train.checkpoint_files import checkpoint_records
from deepspec.train.distributed import World
from deepspec.train.loop import run_train
from tests.conftest import tiny_run
from tests.train.test_batches import step_data

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

    def stopping(trainer, step):
        steps.append(step)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return original(trainer, step)

    monkeypatch.setattr(loop, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_train(Run(tiny_run(ready)))
    resumed = run_train(Run(tiny_run(ready)))
    assert steps[5] == 4, "the newest checkpoint was written after step 4"
    undisturbed = weights(run_train(Run(tiny_run(straight))))
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in weights(resumed).items())
    assert list(checkpoint_records(resumed)) == [4, 6]


def test_a_stopped_run_finishes_its_step_saves_and_resumes_bit_for_bit(
    ready, tmp_path, monkeypatch
):
    """SIGTERM arrives amid the third step, far from any checkpoint."""
    straight = tmp_path / "straight"
    shutil.copytree(ready, straight)
    original = step.accumulate

    def interrupted(trainer, *planned):
        if (
            trainer.strategy.optimizer.state
            and next(iter(trainer.strategy.optimizer.state.values()))["step"] == 2
        ):
            signal.raise_signal(signal.SIGTERM)
        return original(trainer, *planned)

    rare = "train.checkpoint_steps=100"
    with monkeypatch.context() as patched:
        patched.setattr(step, "accumulate", interrupted)
        with pytest.raises(TransientError, match="asked to stop, and did after step 3"):
            run_train(Run(tiny_run(ready, rare)))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert list(checkpoint_records(Run(tiny_run(ready, rare)).artifact("train"))) == [3]
    resumed, undisturbed = (
        weights(run_train(Run(tiny_run(ready, rare)))),
        weights(run_train(Run(tiny_run(straight, rare)))),
    )
    assert all(torch.equal(tensor, undisturbed[name]) for name, tensor in resumed.items())


def test_a_draft_trained_on_older_hidden_states_is_not_sealed_with_the_new_ones(
    ready: Path, monkeypatch
):
    config = tiny_run(ready, "resources.checks.recapture_every=1000")
    hidden, draft = Run(config).artifact("hidden"), run_train(Run(config))
    states = Capture.states

    def others(self, rows):
        return (
            (row, output._replace(context=1.01 * output.context))
            for row, output in states(self, rows)
        )

    hidden.store.remove(hidden.path("records/00001.json"))
    monkeypatch.setattr(Capture, "states", others)
    run_capture(Run(config))
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
    assert len(step_data(cache, config).micro_batches(0)) > 2
    assert_close(weights(run_train(Run(tiny_run(ready, *sets)))), weights(run_train(Run(config))))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_samples(ready: Path):
    config = tiny_run(ready, "train.lr=1e20", "train.warmup=0")
    with pytest.raises(TrainingFailed, match="sample ids are in bad_step_"):
        run_train(Run(config))
    artifact = Run(config).artifact("train")
    assert any(name.startswith("bad_step_") for name in artifact.store.names(artifact.folder))
