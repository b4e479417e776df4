"""Exports: what each engine reads, what none can load, and that an export drafts as its
original.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.export.engines import ENGINES
from deepspec.export.export import export_draft, read_temperatures
from deepspec.model.checkpoint import load_draft, save_draft
from tests.model.drafts import CONFIGS, VOCAB, make_draft, make_spec

HEADS = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"
LOADABLE = {
    ("qwen3", "vanilla"): {"vllm", "sglang", "speculators"},
    ("qwen3", "gated"): {"sglang"},
    ("qwen3", "rnn"): {"sglang"},
    ("qwen3", "confidence_alone"): {"vllm", "sglang", "speculators"},
    ("qwen3", "dflash"): {"vllm", "sglang", "speculators"},
    ("qwen3", "context"): {"vllm", "sglang", "speculators"},
    ("qwen3", "context_rnn"): {"sglang"},
    ("qwen3", "eagle3"): {"vllm", "speculators"},
    ("gemma4", "vanilla"): {"vllm"},
    ("gemma4", "confidence_alone"): {"vllm"},
    ("gemma4", "dflash"): {"vllm"},
    ("gemma4", "context"): {"vllm"},
}
PAIRS = [
    (family, name, engine)
    for family in ("qwen3", "gemma4", "gemma4_with_values")
    for name in CONFIGS
    for engine in ENGINES
]


def exported(
    folder: Path, engine: str, name: str = "vanilla", **made: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    save_draft(make_draft(CONFIGS[name], lowest=0, **made), folder / "draft")
    return export(folder / "draft", engine, folder / "out")


def export(draft: Path, engine: str, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    export_draft(draft, engine=engine, out=out)
    return json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")


@pytest.mark.parametrize(("family", "name", "engine"), PAIRS)
def test_every_pair_is_exported_or_refused_with_its_reason(
    family: str, name: str, engine: Any, tmp_path: Path
) -> None:
    allowed = {"hf", *LOADABLE.get((family, name), set())}
    if engine in allowed:
        exported(tmp_path, engine, name, target=family)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "README.md",
            "config.json",
            "model.safetensors",
        ]
        return
    reason = ENGINES[engine].why_not(make_spec(CONFIGS[name], target=family, lowest=0))
    assert reason
    with pytest.raises(ConfigError, match=f"{engine} cannot load") as caught:
        exported(tmp_path, engine, name, target=family)
    assert reason in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft"]


@pytest.mark.parametrize(
    ("made", "engine", "reason"),
    [
        ({"target": "gemma4_with_values"}, "vllm", r"values from the key projection \(V = K\)"),
        ({"lowest": -1}, "sglang", "refuses layer -1"),
    ],
)
def test_what_an_engine_would_compute_wrongly_or_refuse_is_refused_here(
    made: dict[str, Any], engine: str, reason: str, tmp_path: Path
) -> None:
    save_draft(make_draft(**made), tmp_path / "draft")
    with pytest.raises(ConfigError, match=reason):
        export_draft(tmp_path / "draft", engine=engine, out=tmp_path / "out")


@pytest.mark.parametrize("engine", ["vllm", "sglang", "hf"])
def test_dspark_goes_out_as_it_is_with_its_layout_written_out(engine: str, tmp_path: Path) -> None:
    """Trap E8."""
    config, tensors = exported(tmp_path, engine)
    wanted = {
        "architectures": ["Qwen3DSparkModel"],
        "sample_from_anchor": True,
        "dspark_bonus_anchor": False,
        "block_size": 4,
        "target_layer_ids": [0, 1, 2],
        "mask_token_id": VOCAB - 1,
        "rope_theta": 10000.0,
        "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert {key: config[key] for key in wanted} == wanted
    assert set(tensors) == set(make_draft().state_dict())


def test_a_gemma4_draft_goes_to_vllm_under_its_own_architecture(tmp_path: Path) -> None:
    config, _ = exported(tmp_path, "vllm", target="gemma4")
    assert config["architectures"] == ["Gemma4DSparkModel"]
    assert config["rope_parameters"]["full_attention"]["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize("engine", ["vllm", "sglang", "speculators"])
@pytest.mark.parametrize("name", ["dflash", "confidence_alone"])
def test_a_block_draft_without_a_markov_head_goes_out_as_dspark_with_one_of_zeros(
    engine: str, name: str, tmp_path: Path
) -> None:
    """Trap E8: served as DFlash, whose anchor predicts nothing there, next to nothing of what it
    drafted was accepted, without any error.
    """
    config, tensors = exported(tmp_path, engine, name)
    inner = config.get("transformer_layer_config", config)
    wanted = {"markov_rank": 1, "markov_head_type": "vanilla"}
    wanted |= {"enable_confidence_head": name != "dflash", "block_size": 4}
    for part in (config, inner):
        assert {key: part[key] for key in wanted} == wanted
        assert (part["sample_from_anchor"], part["dspark_bonus_anchor"]) == (True, False)
        assert "dflash_config" not in part
    assert inner["architectures"] == ["Qwen3DSparkModel"]
    assert config.get("speculators_model_type", "dspark") == "dspark"
    assert set(tensors) == {*make_draft(CONFIGS[name]).state_dict(), *HEADS}
    for head in HEADS:
        assert tensors[head].shape == (VOCAB, 1)
        assert not tensors[head].any()
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("Markov head of zeros" in card) == (name == "dflash")


def test_eagle3_counts_its_layers_as_vllm_does(tmp_path: Path) -> None:
    config, _ = exported(tmp_path, "vllm", "eagle3")
    assert config["architectures"] == ["Eagle3Qwen3ForCausalLM"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert (config["draft_vocab_size"], config["norm_before_residual"]) == (VOCAB, False)


@pytest.mark.parametrize("name", ["vanilla", "dflash", "eagle3"])
def test_the_speculators_format_wraps_the_drafts_config(name: str, tmp_path: Path) -> None:
    config, _ = exported(tmp_path, "speculators", name)
    algorithm = "eagle3" if name == "eagle3" else "dspark"
    assert (
        config["speculators_model_type"] == config["speculators_config"]["algorithm"] == algorithm
    )
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert config["aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["transformer_layer_config"]["num_hidden_layers"] == (1 if name == "eagle3" else 2)
    if name != "eagle3":
        assert (config["mask_token_id"], config["block_size"], config["sample_from_anchor"]) == (
            VOCAB - 1,
            4,
            True,
        )


def test_an_hf_export_loads_here_again_in_its_own_dtype(tmp_path: Path) -> None:
    save_draft(make_draft().to(torch.bfloat16), tmp_path / "draft")
    export_draft(tmp_path / "draft", engine="hf", out=tmp_path / "out")
    assert load_draft(tmp_path / "out").spec == make_spec()
    assert load_file(tmp_path / "out" / "model.safetensors")["fc.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_everyone_may_read_an_export_and_its_owner_alone_may_change_it(
    mask: int, tmp_path: Path
) -> None:
    """Weights were written for their owner alone: a server under another user could not read."""
    save_draft(make_draft(), tmp_path / "draft")
    (tmp_path / "draft" / "calibration.json").write_text('{"temperatures": [1, 1, 1, 1]}')
    before = os.umask(mask)
    try:
        export_draft(tmp_path / "draft", engine="vllm", out=tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert modes == dict.fromkeys(
        ("README.md", "calibration.json", "config.json", "model.safetensors"), 0o644
    )


def test_an_export_that_would_draft_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the comparison: ids written without the engine's + 1."""
    vllm = ENGINES["vllm"]

    def shifted(spec: Any, dtype: str) -> dict[str, Any]:
        return vllm.write(spec, dtype) | {"eagle_aux_hidden_state_layer_ids": [2, 3, 4]}

    monkeypatch.setitem(ENGINES, "vllm", vllm._replace(write=shifted))
    with pytest.raises(ArtifactMismatch, match="does not draft as the original"):
        exported(tmp_path, "vllm", "eagle3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft"]


def test_a_head_that_is_not_zero_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control for what is added to DFlash."""
    monkeypatch.setattr("deepspec.export.export.torch.zeros", torch.ones)
    with pytest.raises(ArtifactMismatch, match="does not draft as the original"):
        exported(tmp_path, "vllm", "dflash")


def test_the_calibration_goes_along_as_a_file_and_is_checked_for_the_engine_that_reads_it(
    tmp_path: Path,
) -> None:
    """Not as the tensor `confidence_head.sts_temperatures`, which SGLang refuses to load."""
    save_draft(make_draft(lowest=0), tmp_path / "draft")
    calibration = tmp_path / "draft" / "calibration.json"
    calibration.write_text(json.dumps({"temperatures": [1.0, 1.5, 2.0, 2.5]}))
    _, tensors = export(tmp_path / "draft", "sglang", tmp_path / "out")
    assert set(tensors) == set(make_draft().state_dict())
    assert (tmp_path / "out" / "calibration.json").read_text() == calibration.read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--speculative-dspark-confidence-sts-path calibration.json" in card
    calibration.write_text(json.dumps({"temperatures": [1.0]}))
    with pytest.raises(ArtifactMismatch, match="1 temperatures"):
        export_draft(tmp_path / "draft", engine="sglang", out=tmp_path / "other")


def test_a_folder_in_use_an_unknown_engine_and_no_draft_are_refused(tmp_path: Path) -> None:
    save_draft(make_draft(), tmp_path / "draft")
    with pytest.raises(ConfigError, match="not empty"):
        export_draft(tmp_path / "draft", engine="hf", out=tmp_path / "draft")
    with pytest.raises(ConfigError, match="no engine 'tgi'"):
        export_draft(tmp_path / "draft", engine="tgi", out=tmp_path / "out")
    (tmp_path / "draft").rename(tmp_path / "moved")
    with pytest.raises(ArtifactMismatch, match="holds no draft"):
        export_draft(tmp_path, engine="hf", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "Invalid JSON"),
        ("[1.0, 1.0]", "no calibration"),
        ('{"temperatures": 1.0}', "valid array"),
        ('{"temperatures": [1.0]}', "1 temperatures"),
        ('{"temperatures": [1.0, 0.0]}', "greater than 0"),
        ('{"temperatures": [1.0, "hot"]}', "valid number"),
        ('{"temperatures": [1.0, NaN]}', "finite number"),
    ],
)
def test_a_file_that_is_no_calibration_of_this_draft_is_refused(
    text: str, said: str, tmp_path: Path
):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(ArtifactMismatch, match=said):
        read_temperatures(path, 2)


def test_a_draft_with_a_tensor_missing_is_not_exported(tmp_path: Path) -> None:
    save_draft(make_draft(), tmp_path / "draft")
    tensors = load_file(tmp_path / "draft" / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "draft" / "model.safetensors")
    with pytest.raises(ArtifactMismatch, match=r'Missing .* "norm\.weight"'):
        export_draft(tmp_path / "draft", engine="hf", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
