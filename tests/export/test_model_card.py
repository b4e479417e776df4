"""What an export says of its draft: the target it is for, how it is served, where it comes from."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from deepspec.__main__ import app
from deepspec.export.export import export_draft
from deepspec.model.checkpoint import save_draft
from tests.model.drafts import CONFIGS, make_draft

TRAIN = {"stage": "train", "name": "dspark-demo", "fingerprint": "0123456789ab"}
HIDDEN = {"stage": "hidden", "name": "demo", "fingerprint": "aaaabbbbcccc"}
DEMO = {"stage": "demo", "name": "demo", "fingerprint": "ddddeeeeffff"}


def describe(
    store: Path, key: dict[str, str], *, recipe: Any = None, inputs: tuple[Any, ...] = ()
) -> Path:
    folder = store / key["stage"] / f"{key['name']}-{key['fingerprint']}"
    folder.mkdir(parents=True, exist_ok=True)
    info = key | {"recipe": recipe or {}, "inputs": inputs, "code_version": "0.1.0"}
    (folder / "artifact.json").write_text(json.dumps(info))
    return folder


def named(folder: Path, algorithm: str = "vanilla", **known: Any) -> Path:
    """A draft whose config has these keys."""
    save_draft(make_draft(CONFIGS[algorithm], lowest=0), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | known))
    return folder


def exported(draft: Path | str, out: Path, engine: str = "vllm") -> tuple[dict[str, Any], str]:
    """Its config and its card."""
    export_draft(draft, engine=engine, out=out)
    return json.loads((out / "config.json").read_text()), (out / "README.md").read_text()


def front(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---")[1])


def commands(card: str) -> list[list[str]]:
    return [shlex.split(block) for block in re.findall(r"```sh\n(.*?)\n```", card, re.DOTALL)]


EXPORTABLE = [
    (engine, algorithm)
    for engine in ("vllm", "sglang", "speculators", "hf")
    for algorithm in ("vanilla", "dflash", "eagle3")
    if (engine, algorithm) != ("sglang", "eagle3")
]


@pytest.mark.parametrize(("engine", "algorithm"), EXPORTABLE)
def test_the_targets_name_is_in_every_export(engine: str, algorithm: str, tmp_path: Path) -> None:
    draft = named(tmp_path / "draft", algorithm, _name_or_path="Qwen/Qwen3-4B")
    config, card = exported(draft, tmp_path / "out", engine)
    inner = config.get("transformer_layer_config", config)
    assert inner["_name_or_path"] == "Qwen/Qwen3-4B"
    assert inner.get("target_model_name_or_path", "Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    if engine == "speculators":
        verifier = {"name_or_path": "Qwen/Qwen3-4B", "architectures": ["Qwen3ForCausalLM"]}
        assert config["speculators_config"]["verifier"] == verifier
    assert front(card)["base_model"] == "Qwen/Qwen3-4B"
    assert "| target | Qwen/Qwen3-4B |" in card


def test_the_verifiers_architectures_are_the_targets_own(tmp_path: Path) -> None:
    draft = named(tmp_path / "draft", target_architectures=["OurQwen3ForCausalLM"])
    config, _ = exported(draft, tmp_path / "out", "speculators")
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": None,
        "architectures": ["OurQwen3ForCausalLM"],
    }


@pytest.mark.parametrize("engine", ["vllm", "sglang", "speculators", "hf"])
def test_a_target_in_a_folder_is_named_by_its_path_and_gives_its_number_format(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft is trained in float32, and SGLang would have made float16 of that."""
    target = tmp_path / "models" / "ours"
    target.mkdir(parents=True)
    own = {"dtype": "bfloat16", "architectures": ["OurQwen3ForCausalLM"]}
    (target / "config.json").write_text(json.dumps(own))
    monkeypatch.chdir(tmp_path)
    draft = named(tmp_path / "draft", _name_or_path="models/ours", target_dtype="float32")
    config, card = exported(draft, tmp_path / "out", engine)
    inner = config.get("transformer_layer_config", config)
    assert inner["_name_or_path"] == str(target)
    assert (config["dtype"], inner["dtype"]) == ("bfloat16", "bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    if engine == "speculators":
        verifier = {"name_or_path": str(target), "architectures": ["OurQwen3ForCausalLM"]}
        assert config["speculators_config"]["verifier"] == verifier
    assert "base_model" not in front(card)  # names what is on the hub
    assert f"| target | {target} |" in card


def test_what_an_older_draft_does_not_record_comes_from_its_store(tmp_path: Path) -> None:
    store, recipe = tmp_path / "store", {"target": {"model": "Qwen/Qwen3-4B", "dtype": "bfloat16"}}
    folder = describe(store, TRAIN, inputs=(HIDDEN,))
    describe(store, HIDDEN, recipe=recipe)
    named(folder / "draft", _name_or_path="")
    for number, draft in enumerate((folder, f"file://{folder}", folder / "draft")):
        config, card = exported(draft, tmp_path / f"out-{number}")
        assert (config["_name_or_path"], config["dtype"]) == ("Qwen/Qwen3-4B", "bfloat16")
        assert front(card)["base_model"] == "Qwen/Qwen3-4B"


def test_the_demos_target_is_that_of_the_store_and_unknown_without_it(tmp_path: Path) -> None:
    store, recipe = tmp_path / "store", {"target": {"model": "demo", "dtype": "float32"}}
    folder = describe(store, TRAIN, inputs=(HIDDEN,))
    describe(store, HIDDEN, recipe=recipe, inputs=(DEMO,))
    target = describe(store, DEMO) / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"dtype": "float32"}))
    named(folder / "draft", _name_or_path="demo")
    config, _ = exported(folder, tmp_path / "out")
    assert config["_name_or_path"] == str(target)
    (folder / "draft").rename(tmp_path / "draft")
    config, card = exported(tmp_path / "draft", tmp_path / "alone")
    assert config["_name_or_path"] == ""
    assert "not named in its config" in card


def test_the_cards_commands_serve_the_draft_from_its_folder(tmp_path: Path) -> None:
    draft = named(tmp_path / "draft", _name_or_path="/models/a name")
    _, card = exported(draft, tmp_path / "vllm")
    greedy, sampled = commands(card)
    settings = {"method": "dspark", "model": ".", "num_speculative_tokens": 4}
    assert greedy[:4] == ["vllm", "serve", "/models/a name", "--speculative-config"]
    assert json.loads(greedy[4]) == settings
    assert json.loads(sampled[4]) == settings | {"draft_sample_method": "probabilistic"}

    _, card = exported(draft, tmp_path / "speculators", "speculators")
    greedy, sampled = commands(card)
    assert greedy == ["vllm", "serve", "."]
    assert json.loads(sampled[4]) == {"draft_sample_method": "probabilistic"}

    (draft / "calibration.json").write_text('{"temperatures": [1, 1, 1, 1]}')
    _, card = exported(draft, tmp_path / "sglang", "sglang")
    plain, calibrated = commands(card)
    assert plain[:5] == ["python", "-m", "sglang.launch_server", "--model-path", "/models/a name"]
    assert plain[5:] == [
        *("--speculative-algorithm", "DSPARK"),
        *("--speculative-draft-model-path", "."),
    ]
    flag = ["--speculative-dspark-confidence-sts-path", "calibration.json"]
    assert calibrated == ["env", "SGLANG_RAGGED_VERIFY_MODE=compact", *plain, *flag]


@pytest.mark.parametrize("engine", ["vllm", "speculators"])
def test_a_target_that_nothing_names_is_left_to_the_reader(engine: str, tmp_path: Path) -> None:
    _, card = exported(named(tmp_path / "draft", "eagle3"), tmp_path / "out", engine)
    assert "not named in the draft) for TARGET" in card
    for command in commands(card):
        assert command[:3] == ["vllm", "serve", "TARGET"]
        assert json.loads(command[4])["method"] == "eagle3"


def test_the_command_exports_a_train_artifact_and_its_card_says_where_it_comes_from(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    folder = describe(store, TRAIN, recipe={"train": {"lr": 6e-4}}, inputs=(HIDDEN,))
    describe(store, HIDDEN)
    save_draft(make_draft(), folder / "draft")
    evaluation = {"stage": "evaluate", "name": "dspark-demo", "fingerprint": "ffff"}
    result = describe(store, evaluation, inputs=(TRAIN,))
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
        info = TRAIN | {"recipe": {}, "inputs": [], "code_version": "0.1.0"}
        (tmp_path / "artifact.json").write_text(json.dumps(info))
    _, card = exported(named(tmp_path / "draft"), tmp_path / "out", "hf")
    assert card.count("Unknown") == 3
