"""Exports: what each engine reads, what none can load, and that an export drafts as its
original.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deepspec.__main__ import app
from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.export.engines import ENGINES
from deepspec.export.export import TEMPERATURES, export_draft, read_temperatures
from deepspec.model.checkpoint import load_draft, save_draft
from tests.model.drafts import CONFIGS, VOCAB, make_draft, make_spec

LOADABLE = {
    ("qwen3", "vanilla"): {"vllm", "sglang", "speculators"},
    ("qwen3", "gated"): {"sglang"},
    ("qwen3", "rnn"): {"sglang"},
    ("qwen3", "confidence_alone"): {"sglang"},
    ("qwen3", "dflash"): {"vllm", "sglang", "speculators"},
    ("qwen3", "eagle3"): {"vllm", "speculators"},
    ("gemma4", "vanilla"): {"vllm"},
}
PAIRS = [
    (family, name, engine)
    for family in ("qwen3", "gemma4")
    for name in CONFIGS
    for engine in ENGINES
]


def exported(
    folder: Path, engine: str, name: str = "vanilla", *, target: str = "qwen3"
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    save_draft(make_draft(CONFIGS[name], target=target), folder / "draft")
    export_draft(folder / "draft", engine=engine, out=folder / "out")
    return json.loads((folder / "out" / "config.json").read_text()), load_file(
        folder / "out" / "model.safetensors"
    )


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
    reason = ENGINES[engine].why_not(make_spec(CONFIGS[name], target=family))
    assert reason
    with pytest.raises(ConfigError, match=f"{engine} cannot load") as caught:
        exported(tmp_path, engine, name, target=family)
    assert reason in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft"]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "hf"])
def test_dspark_goes_out_as_it_is_with_its_layout_written_out(engine: str, tmp_path: Path) -> None:
    """Trap E8."""
    config, tensors = exported(tmp_path, engine)
    wanted = {
        "architectures": ["Qwen3DSparkModel"],
        "sample_from_anchor": True,
        "dspark_bonus_anchor": False,
        "block_size": 4,
        "target_layer_ids": [-1, 1, 2],
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


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_dflash_leaves_out_what_the_target_has_and_says_how_its_blocks_lie(
    engine: str, tmp_path: Path
) -> None:
    config, tensors = exported(tmp_path, engine, "dflash")
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["hidden_act"] == "silu"
    assert config["dflash_config"] == {
        "target_layer_ids": [-1, 1, 2],
        "num_target_layers": 5,
        "mask_token_id": VOCAB - 1,
        "block_size": 4,
        "sample_from_anchor": True,
        "query_zero_predicts_next": True,
    }
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(tensors)
    assert "sample_from_anchor: true" in (tmp_path / "out" / "README.md").read_text()


def test_eagle3_counts_its_layers_as_vllm_does(tmp_path: Path) -> None:
    config, _ = exported(tmp_path, "vllm", "eagle3")
    assert config["architectures"] == ["Eagle3Qwen3ForCausalLM"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert (config["draft_vocab_size"], config["norm_before_residual"]) == (VOCAB, False)


@pytest.mark.parametrize("name", ["vanilla", "dflash", "eagle3"])
def test_the_speculators_format_wraps_the_drafts_config(name: str, tmp_path: Path) -> None:
    config, _ = exported(tmp_path, "speculators", name)
    algorithm = make_spec(CONFIGS[name]).algorithm
    assert (
        config["speculators_model_type"] == config["speculators_config"]["algorithm"] == algorithm
    )
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert config["aux_hidden_state_layer_ids"] == ([1, 2, 3] if name == "eagle3" else [0, 2, 3])
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


def test_temperatures_are_written_only_where_the_draft_was_calibrated(tmp_path: Path) -> None:
    assert TEMPERATURES not in exported(tmp_path / "without", "sglang")[1]
    save_draft(make_draft(), tmp_path / "draft")
    (tmp_path / "draft" / "calibration.json").write_text(
        json.dumps({"temperatures": [1.0, 1.5, 2.0, 2.5]})
    )
    export_draft(tmp_path / "draft", engine="sglang", out=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")[TEMPERATURES].tolist() == [
        1.0,
        1.5,
        2.0,
        2.5,
    ]
    (tmp_path / "draft" / "calibration.json").write_text(json.dumps({"temperatures": [1.0]}))
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


def test_the_command_exports_a_train_artifact_and_its_card_says_where_it_comes_from(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "store" / "train" / "dspark-demo-0123456789ab"
    save_draft(make_draft(), folder / "draft")
    made_from = {"stage": "hidden", "name": "demo", "fingerprint": "aaaabbbbcccc"}
    train = {"stage": "train", "name": "dspark-demo", "fingerprint": "0123456789ab"}
    info = {
        **train,
        "recipe": {"train": {"lr": 6e-4}},
        "inputs": [made_from],
        "code_version": "0.1.0",
    }
    (folder / "artifact.json").write_text(json.dumps(info))
    hidden = tmp_path / "store" / "hidden" / "demo-aaaabbbbcccc"
    hidden.mkdir(parents=True)
    (hidden / "artifact.json").write_text(
        json.dumps({**made_from, "recipe": {}, "inputs": [], "code_version": "0.1.0"})
    )
    result = tmp_path / "store" / "evaluate" / "dspark-demo-ffff"
    result.mkdir(parents=True)
    evaluation = {
        "stage": "evaluate",
        "name": "dspark-demo",
        "fingerprint": "ffff",
        "recipe": {},
        "inputs": [train],
        "code_version": "",
    }
    (result / "artifact.json").write_text(json.dumps(evaluation))
    (result / "summary.json").write_text(
        json.dumps({"acceptance_length": {"macro": 3.456, "math": 4.0}, "temperature": 1.0})
    )
    (result / "manifest.json").write_text("{}")

    done = CliRunner().invoke(app, ["export", str(folder), "--to", "vllm", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "hidden/demo-aaaabbbbcccc",
        "lr: 0.0006",
        "macro 3.46, math 4.00",
        '"num_speculative_tokens": 4',
        "vanilla, rank 6",
    ):
        assert fact in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("copied", [False, True])
def test_a_card_says_what_is_not_known(copied: bool, tmp_path: Path) -> None:
    """Also of a train artifact that was copied out of its store."""
    if copied:
        fields = {"stage": "train", "name": "dspark-demo", "fingerprint": "0123456789ab"}
        info = fields | {"recipe": {}, "inputs": [], "code_version": "0.1.0"}
        (tmp_path / "artifact.json").write_text(json.dumps(info))
    exported(tmp_path, "hf")
    assert (tmp_path / "out" / "README.md").read_text().count("Unknown") == 3
