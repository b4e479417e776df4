"""The draft as training holds it: frozen weights in the target's dtype where none is rounded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepspec.artifacts.run import Run
from deepspec.cache.reader import HiddenCache
from deepspec.model.checkpoint import read_spec, save_draft
from deepspec.model.drafter import Drafter
from deepspec.train import draft_artifact
from deepspec.train.draft_artifact import make_draft
from deepspec.train.loop import run_train
from tests.conftest import tiny_run

BFLOAT16 = "train.compute_dtype=bfloat16"


@pytest.fixture
def of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's embedding and lm_head are of that dtype, as a real target's are."""
    load = draft_artifact.load_file

    def rounded(*arguments: object) -> dict[str, Tensor]:
        return {name: tensor.bfloat16() for name, tensor in load(*arguments).items()}

    monkeypatch.setattr(draft_artifact, "load_file", rounded)


def frozen_dtype(store: Path, *overrides: str) -> torch.dtype:
    config = tiny_run(store, *overrides)
    draft = make_draft(config, HiddenCache(Run(config).artifact("hidden")), torch.device("cpu"))
    assert draft.fc.weight.dtype == torch.float32
    assert draft.embed_tokens.weight.dtype == draft.lm_head.weight.dtype
    return draft.lm_head.weight.dtype


def test_a_float32_targets_weights_are_not_rounded(captured: Path):
    assert frozen_dtype(captured, BFLOAT16) == torch.float32


@pytest.mark.usefixtures("of_bfloat16")
def test_frozen_weights_are_held_in_the_dtype_that_is_computed_in(captured: Path):
    assert frozen_dtype(captured, BFLOAT16) == torch.bfloat16
    assert frozen_dtype(captured, "train.compute_dtype=float32") == torch.float32


@pytest.mark.usefixtures("of_bfloat16")
def test_a_training_and_its_files_are_the_same_bit_for_bit(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Resumed in between, from a checkpoint in float32 as ever."""
    made: list[dict[str, bytes]] = []
    for name in ("held", "float32"):
        shutil.copytree(captured, tmp_path / name)
        run = Run(tiny_run(tmp_path / name, BFLOAT16))
        artifact = run_train(run)
        artifact.store.remove(artifact.path("manifest.json"))
        artifact.store.remove(artifact.path("checkpoints/00000006"))
        run_train(run)
        made.append({file: artifact.read(f"draft/{file}") for file in ("model.safetensors",)})
        monkeypatch.setattr(Drafter, "hold_frozen", lambda *_: None)
    assert made[0] == made[1]


@pytest.mark.parametrize("recipe", ["demo", "dflash-demo", "eagle3-demo"])
def test_a_drafts_config_keeps_its_targets_name_architectures_and_number_format(
    recipe: str, captured: Path, tmp_path: Path
):
    """The cache leaves the name out, and exports had none: a server could not find the target."""
    config = tiny_run(captured, "target.layer_ids=[0, 1, 2]", recipe=recipe)
    source = HiddenCache(Run(tiny_run(captured)).artifact("hidden"))
    draft = make_draft(config, source, torch.device("cpu"))
    save_draft(draft, tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["_name_or_path"] == kept.get("target_model_name_or_path", "demo") == "demo"
    assert (kept["target_architectures"], kept["target_dtype"]) == (["Qwen3ForCausalLM"], "float32")
    assert read_spec(tmp_path).text_config["_name_or_path"] == "demo"
