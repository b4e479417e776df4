"""Before the first step: what cannot be learnt from is refused at once, and named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspec.artifacts.run import Run
from deepspec.cache.reader import HiddenCache
from deepspec.errors import TrainingFailed
from deepspec.train import preflight
from deepspec.train.batches import StepData
from deepspec.train.draft_artifact import make_draft
from deepspec.train.loop import run_train
from deepspec.train.preflight import check_before_training
from tests.conftest import tiny_run
from tests.train.test_batches import step_data


@pytest.fixture
def parts(captured: Path):
    config = tiny_run(captured)
    cache = HiddenCache(Run(config).artifact("hidden"))
    return Run(config), step_data(cache, config), make_draft(config, cache, torch.device("cpu"))


def test_a_sound_cache_passes_and_the_draft_is_left_as_it_was(parts):
    run, data, draft = parts
    before = {name: tensor.clone() for name, tensor in draft.state_dict().items()}
    check_before_training(run, data, draft)
    assert all(torch.equal(before[name], tensor) for name, tensor in draft.state_dict().items())
    assert all(parameter.grad is None for parameter in draft.parameters())


def test_the_copy_that_learns_shares_what_it_does_not_change(
    parts, monkeypatch: pytest.MonkeyPatch
):
    """Embedding and lm_head, the largest tensors, were in memory twice."""
    run, data, draft = parts
    shared, original = list[bool](), preflight.loss_computed_in

    def computed_in(dtype, mirror, *batch):
        assert mirror.fc.weight is not draft.fc.weight
        shared.append(mirror.lm_head.weight is draft.lm_head.weight)
        shared.append(mirror.embed_tokens.weight is draft.embed_tokens.weight)
        return original(dtype, mirror, *batch)

    monkeypatch.setattr(preflight, "loss_computed_in", computed_in)
    check_before_training(run, data, draft)
    assert shared
    assert all(shared)


@pytest.mark.parametrize("supervised", [0.001, 1.0])
def test_masks_that_cover_nothing_or_everything_are_refused(parts, supervised: float):
    """Trap B1."""
    run, data, draft = parts
    index = data.source.index
    data.source.index = index._replace(
        num_supervised=np.ceil(index.num_tokens * supervised * (supervised == 1.0))
    )
    with pytest.raises(TrainingFailed, match="of the training tokens are supervised"):
        check_before_training(run, data, draft)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("context", 0.0, "all zero"), ("last_hidden", float("nan"), "not finite")],
)
def test_features_that_are_nothing_are_refused(
    parts, monkeypatch: pytest.MonkeyPatch, field: str, value: float, said: str
):
    run, data, draft = parts
    real = StepData.load

    def load(self, group):
        batch = real(self, group)
        return batch._replace(**{field: torch.full_like(getattr(batch, field), value)})

    monkeypatch.setattr(StepData, "load", load)
    with pytest.raises(TrainingFailed, match=said):
        check_before_training(run, data, draft)


def test_a_draft_that_cannot_learn_is_refused_before_the_first_step(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preflight, "OVERFIT_LR", 0.0)
    store = tmp_path / "store"
    shutil.copytree(captured, store)
    with pytest.raises(TrainingFailed, match="trained on one sample alone, its loss does not fall"):
        run_train(Run(tiny_run(store)))
    assert run_train(Run(tiny_run(store, "resources.checks.preflight=warn"))).manifest() is not None
