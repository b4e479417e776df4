"""A draft's config.json is read and written in the published form; what is refused, and why."""

import json
from typing import Any

import pytest

from deepspec.errors import ConfigError
from deepspec.model.config_json import config_from_spec, spec_from_config
from tests.conftest import SHARED
from tests.model.drafts import CONFIGS, GEMMA4, TARGETS, VOCAB, make_spec

VECTORS = SHARED / "reference-vectors"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_spec_survives_its_config(name: str, target: str) -> None:
    spec = make_spec(CONFIGS[name], target=target)
    assert spec_from_config(config_from_spec(spec)) == spec


def test_a_block_draft_writes_its_layout_explicitly() -> None:
    """Trap E8: engines default to other layouts, and then serve at one percent acceptance
    without an error.
    """
    config = config_from_spec(make_spec(target="gemma4"))
    wanted = {
        "architectures": ["Gemma4DSparkModel"],
        "model_type": "gemma4_text",
        "target_text_model_type": "gemma4_text",
        "num_target_layers": 5,
        "num_hidden_layers": 2,
        "block_size": 4,
        "target_layer_ids": [-1, 1, 2],
        "mask_token_id": VOCAB - 1,
        "num_anchors": 3,
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "layer_types": ["full_attention"] * 2,
        "tie_word_embeddings": False,
        "sample_from_anchor": True,
        "dspark_bonus_anchor": False,
        "vocab_size": VOCAB,
    }
    assert {key: config[key] for key in wanted} == wanted
    assert config_from_spec(make_spec(CONFIGS["dflash"]))["markov_rank"] == 0


@pytest.mark.skipif(not VECTORS.is_dir(), reason=f"reference vectors are not at {VECTORS}")
@pytest.mark.parametrize(
    "name",
    [
        "qwen3_dspark_vanilla",
        "qwen3_dspark_gated",
        "qwen3_dflash",
        "gemma4_dspark_vanilla",
        "qwen3_eagle3",
    ],
)
def test_the_references_own_configs_are_read_and_written_alike(name: str) -> None:
    wanted = json.loads((VECTORS / f"{name}.json").read_text())["config"]
    written = config_from_spec(spec_from_config(wanted))
    differing = {key for key in wanted if written.get(key) != wanted[key]}
    assert differing <= {"dtype"}


def test_a_targets_config_is_no_drafts() -> None:
    with pytest.raises(ConfigError, match="no draft's config: target_layer_ids"):
        spec_from_config(GEMMA4)


@pytest.mark.parametrize("name", ["dflash", "eagle3"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size": 0}, "propose 0 tokens"),
        ({"num_hidden_layers": 0}, "have 0 layers"),
        ({"hidden_size": None, "vocab_size": 0}, "vocab_size, hidden_size missing"),
        ({"target_layer_ids": [0, 4]}, "last one"),
        ({"target_layer_ids": [2, 1]}, "not ascending"),
    ],
)
def test_a_drafts_config_that_cannot_be_is_refused(
    name: str, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        spec_from_config(config_from_spec(make_spec(CONFIGS[name])) | change)
