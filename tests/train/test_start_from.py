"""A training that starts from a draft, and one that takes it as it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.artifacts.run import Run
from deepspec.cache.reader import HiddenCache
from deepspec.errors import ArtifactMismatch, ConfigError, DataError
from deepspec.evaluate.results import read_rows
from deepspec.evaluate.stage import run_evaluate
from deepspec.model.checkpoint import FROZEN, load_draft, save_draft
from deepspec.model.drafter import Drafter
from deepspec.train.draft_artifact import make_draft
from deepspec.train.loop import run_train
from tests.conftest import tiny_run

DFLASH = ("draft.markov=null", "draft.confidence=null", "draft.algorithm=dflash", "loss.tv=0.0")
CONTEXT = (*DFLASH, "draft.layout=anchor_is_context")


def fresh(store: Path, *overrides: str) -> Drafter:
    config = tiny_run(store, *overrides)
    return make_draft(config, HiddenCache(Run(config).artifact("hidden")), torch.device("cpu"))


def released(store: Path, folder: Path, **changes: Any) -> Drafter:
    """A draft of other weights in the form of z-lab's, for the target of the store."""
    draft = fresh(store, *CONTEXT, "train.seed=5")
    save_draft(draft, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in FROZEN:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    inner = {key: config.pop(key) for key in ("target_layer_ids", "mask_token_id")}
    for key in ("sample_from_anchor", "dspark_bonus_anchor", "num_anchors", "markov_rank"):
        del config[key]
    config |= {"architectures": ["DFlashDraftModel"], "dflash_config": inner}
    config["block_size"] += 1
    (folder / "config.json").write_text(json.dumps(config | changes))
    return draft


def test_a_released_draft_is_trained_on(captured: Path, tmp_path: Path):
    start = released(captured, tmp_path / "released")
    draft = fresh(captured, *CONTEXT, f"train.start_from={tmp_path / 'released'}")
    state, wanted = draft.state_dict(), start.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert not torch.equal(state["fc.weight"], fresh(captured, *CONTEXT).state_dict()["fc.weight"])
    assert {name for name, p in draft.named_parameters() if not p.requires_grad} == set(FROZEN)


@pytest.mark.parametrize("changed", ["draft.layout=anchor_predicts", "draft.block_size=3"])
def test_weights_fit_another_layout_and_block_size(changed: str, captured: Path, tmp_path: Path):
    start = released(captured, tmp_path / "released")
    draft = fresh(captured, *CONTEXT, changed, f"train.start_from={tmp_path / 'released'}")
    assert torch.equal(draft.state_dict()["fc.weight"], start.state_dict()["fc.weight"])


def test_without_steps_the_draft_is_sealed_and_evaluated_as_it_is(captured: Path, tmp_path: Path):
    start = released(captured, tmp_path / "released")
    shutil.copytree(captured, tmp_path / "store")
    settings = (f"train.start_from={tmp_path / 'released'}", "train.max_steps=0")
    run = Run(tiny_run(tmp_path / "store", *CONTEXT, *settings))
    sealed = load_draft(run_train(run).fetch_folder("draft"))
    wanted = start.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in sealed.state_dict().items())
    rows = read_rows(run_evaluate(run))
    assert rows and all(sum(row["committed"]) > 0 for row in rows)
    assert run_train(run).manifest() is not None  # and nothing is left to do


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((*DFLASH, "draft.num_layers=1"), r"num_layers 2, here 1"),
        ((*DFLASH, "target.mask_token_id=5"), r"mask_token_id \d, here 5"),
        ((), "algorithm dflash, here dspark"),
    ],
)
def test_a_draft_of_other_layers_or_heads_is_refused(
    overrides: tuple[str, ...], reason: str, captured: Path, tmp_path: Path
):
    released(captured, tmp_path / "released")
    with pytest.raises(ArtifactMismatch, match=reason):
        fresh(captured, *overrides, f"train.start_from={tmp_path / 'released'}")


def test_what_it_starts_from_is_in_the_fingerprint_by_what_it_holds(captured: Path, tmp_path: Path):
    def key(*overrides: str) -> str:
        return Run(tiny_run(captured, *CONTEXT, *overrides)).artifact("train").key.fingerprint

    released(captured, tmp_path / "released")
    shutil.copytree(tmp_path / "released", tmp_path / "copy")
    first = key(f"train.start_from={tmp_path / 'released'}")
    assert first == key(f"train.start_from={tmp_path / 'copy'}") != key()
    released(captured, tmp_path / "other", rms_norm_eps=0.5)
    assert key(f"train.start_from={tmp_path / 'other'}") != first
    assert key("train.start_from=null") == key()


def test_no_draft_there_and_no_steps_without_one_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"config\.json and model\.safetensors missing"):
        Run(tiny_run(tmp_path, f"train.start_from={tmp_path}")).check_inputs()
    with pytest.raises(ConfigError, match="max_steps 0 needs"):
        tiny_run(tmp_path, "train.max_steps=0")
