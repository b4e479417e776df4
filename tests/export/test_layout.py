"""Exports of drafts whose anchor predicts nothing, which engines know as DFlash."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.export.engines import ENGINES
from deepspec.export.export import export_draft
from deepspec.model.checkpoint import FROZEN, load_draft, save_draft
from tests.model.drafts import CONTEXT, VOCAB, dspark, make_draft

CONTEXT_DSPARK = dspark(layout="anchor_is_context")


def exported(folder: Path, engine: str, config: Any = CONTEXT, **made: Any) -> dict[str, Any]:
    save_draft(make_draft(config, lowest=0, **made), folder / "draft")
    export_draft(folder / "draft", engine=engine, out=folder / "out")
    return json.loads((folder / "out" / "config.json").read_text())


def card(folder: Path) -> str:
    return (folder / "out" / "README.md").read_text()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_dflash_goes_out_in_the_form_of_released_drafts(engine: str, tmp_path: Path) -> None:
    config = exported(tmp_path, engine)
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["dflash_config"] == {
        "target_layer_ids": [0, 1, 2],
        "num_target_layers": 5,
        "mask_token_id": VOCAB - 1,
        "block_size": 5,
        "sample_from_anchor": False,
    }
    assert (config["block_size"], config["num_target_layers"]) == (5, 5)
    assert (config["hidden_act"], config["layer_types"]) == ("silu", ["full_attention"] * 2)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    original = make_draft(CONTEXT, lowest=0)
    assert set(tensors) == set(original.state_dict()) - set(FROZEN)
    of_target = {name: original.state_dict()[name] for name in FROZEN}
    again = load_draft(tmp_path / "out", shared=of_target)
    assert again.spec == original.spec
    assert torch.equal(again.fc.weight, original.fc.weight)


def test_each_engine_is_started_with_what_it_calls_the_method(tmp_path: Path) -> None:
    exported(tmp_path / "vllm", "vllm")
    settings = '{"method": "dflash", "model": ".", "num_speculative_tokens": 4}'
    assert settings in card(tmp_path / "vllm")
    exported(tmp_path / "sglang", "sglang")
    assert "--speculative-algorithm DFLASH " in card(tmp_path / "sglang")
    exported(tmp_path / "dspark", "vllm", CONTEXT_DSPARK)
    assert '"method": "dspark"' in card(tmp_path / "dspark")
    for name in ("vllm", "sglang", "dspark"):
        assert "sample_from_anchor: false" in card(tmp_path / name)
        assert "zeros" not in card(tmp_path / name)


def test_the_speculators_format_counts_the_anchor_in_a_block(tmp_path: Path) -> None:
    for name, made in {"dflash": CONTEXT, "dspark": CONTEXT_DSPARK}.items():
        config = exported(tmp_path / name, "speculators", made)
        assert config["speculators_model_type"] == name
        assert (config["block_size"], config["sample_from_anchor"]) == (5, False)
        methods = config["speculators_config"]["proposal_methods"]
        assert [method["speculative_tokens"] for method in methods] == [4]
        assert config["aux_hidden_state_layer_ids"] == [1, 2, 3]
        frozen = set(FROZEN) & set(load_file(tmp_path / name / "out" / "model.safetensors"))
        assert frozen == (set() if name == "dflash" else set(FROZEN))
    assert exported(tmp_path / "again", "speculators")["sliding_window_non_causal"] is True


@pytest.mark.parametrize("engine", ["vllm", "sglang", "hf"])
def test_dspark_goes_out_as_it_is_with_its_layout(engine: str, tmp_path: Path) -> None:
    """Their `block_size` is the number of tokens that is proposed in either layout."""
    config = exported(tmp_path, engine, CONTEXT_DSPARK)
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert (config["block_size"], config["sample_from_anchor"]) == (4, False)
    assert config["dspark_bonus_anchor"] is True


def test_gemma4_has_no_dflash_in_engines_and_goes_out_as_dspark(tmp_path: Path) -> None:
    config = exported(tmp_path, "vllm", target="gemma4")
    assert config["architectures"] == ["Gemma4DSparkModel"]
    assert (config["block_size"], config["sample_from_anchor"]) == (4, False)
    assert "Markov head of zeros" in card(tmp_path)


@pytest.mark.parametrize("wrong", [{"block_size": 4}, {"sample_from_anchor": True}])
def test_a_wrong_size_or_layout_is_not_written(
    wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the comparison."""
    vllm = ENGINES["vllm"]

    def mistaken(spec: Any, dtype: str) -> dict[str, Any]:
        config = vllm.write(spec, dtype)
        return config | {"dflash_config": config["dflash_config"] | wrong}

    monkeypatch.setitem(ENGINES, "vllm", vllm._replace(write=mistaken))
    with pytest.raises((ArtifactMismatch, ConfigError), match=r"as the original|different layouts"):
        exported(tmp_path, "vllm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft"]


def test_a_draft_without_the_targets_tensors_is_refused_with_what_can_be_done(
    tmp_path: Path,
) -> None:
    exported(tmp_path, "vllm")
    with pytest.raises(ArtifactMismatch, match=r"takes embed_tokens\.weight and lm_head\.weight"):
        export_draft(tmp_path / "out", engine="sglang", out=tmp_path / "again")
    assert not (tmp_path / "again").exists()
