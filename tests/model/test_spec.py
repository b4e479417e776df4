"""From a target's config to a draft's and back; what is refused, and why."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepspec.errors import ConfigError
from deepspec.model.spec import DraftSpec
from tests.conftest import SHARED
from tests.model.drafts import CONFIGS, GEMMA4, QWEN3, TARGETS, VOCAB, make_spec

VECTORS = SHARED / "reference-vectors"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_spec_survives_its_config(name: str, target: str) -> None:
    spec = make_spec(CONFIGS[name], target=target)
    assert DraftSpec.from_config(spec.to_config()) == spec


def test_a_block_draft_writes_its_layout_explicitly() -> None:
    """Trap E8: engines default to other layouts, and then serve at one percent acceptance
    without an error.
    """
    config = make_spec(target="gemma4").to_config()
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
    assert make_spec(CONFIGS["dflash"]).to_config()["markov_rank"] == 0


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
    written = DraftSpec.from_config(wanted).to_config()
    differing = {key for key in wanted if written.get(key) != wanted[key]}
    assert differing <= {"dtype"}


@pytest.mark.parametrize(
    ("layer_ids", "reason"),
    [
        ([0, 4], "last one"),
        ([0, 9], "has no layers"),
        ([2, 1], "not ascending"),
        ([1, 1], "not ascending"),
        ([-2], "has no layers"),
        ([], "not"),
    ],
)
def test_layers_that_cannot_be_captured_are_refused(layer_ids: list[int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        DraftSpec.from_target(QWEN3, CONFIGS["dflash"], layer_ids=layer_ids, mask_token_id=0)


def test_eagle3_cannot_read_the_embedding_output() -> None:
    with pytest.raises(ConfigError, match="eagle3 cannot read"):
        DraftSpec.from_target(QWEN3, CONFIGS["eagle3"], layer_ids=[-1, 0, 1])


@pytest.mark.parametrize(
    ("mask_token_id", "reason"), [(VOCAB, "outside"), (-1, "outside"), (None, "needs a mask token")]
)
def test_a_mask_token_outside_the_vocabulary_is_refused(mask_token_id: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        DraftSpec.from_target(QWEN3, CONFIGS["dflash"], layer_ids=[0], mask_token_id=mask_token_id)


def test_a_targets_config_is_no_drafts() -> None:
    with pytest.raises(ConfigError, match="no draft's config: target_layer_ids"):
        DraftSpec.from_config(GEMMA4)


@pytest.mark.parametrize("name", ["dflash", "eagle3"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size": 0}, "proposes 0 tokens"),
        ({"num_hidden_layers": 0}, "of 0 layers"),
        ({"hidden_size": None, "vocab_size": 0}, "vocab_size, hidden_size missing"),
        ({"target_layer_ids": [0, 4]}, "last one"),
        ({"target_layer_ids": [2, 1]}, "not ascending"),
    ],
)
def test_a_drafts_config_that_cannot_be_is_refused(
    name: str, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        DraftSpec.from_config(make_spec(CONFIGS[name]).to_config() | change)
