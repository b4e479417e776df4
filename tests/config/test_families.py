"""Families are told by config.json alone; what a draft cannot have is refused by name."""

from typing import Any

import pytest

from deepspec.config.families import (
    GEMMA4,
    QWEN3,
    HeadGeometry,
    RopeSettings,
    family_of,
    head_geometry,
    rope_settings,
    text_config,
)
from deepspec.errors import ConfigError

GEMMA = {
    "model_type": "gemma4_text",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def test_a_family_is_told_by_the_text_config() -> None:
    assert family_of({"model_type": "qwen3"}) is QWEN3
    nested = {"model_type": "gemma4", "text_config": GEMMA}
    assert family_of(nested) is family_of(GEMMA) is GEMMA4
    assert text_config(nested) == GEMMA


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama"}, "no draft is known for targets of type 'llama'"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({}, "None"),
        ({**GEMMA, "enable_moe_block": True}, "mixture-of-experts"),
        ({**GEMMA, "hidden_size_per_layer_input": 256}, "per-layer inputs"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention biases"),
    ],
)
def test_targets_that_a_draft_cannot_follow_are_refused(
    config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        family_of(config)


def test_a_gemma_draft_takes_the_heads_of_the_global_layers() -> None:
    """Old configs name them, Transformers from 5.2x on writes them per layer."""
    named = {
        **GEMMA,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    }
    per_layer = {
        **GEMMA,
        "attention_k_eq_v": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": {
            "0": {"head_dim": 99},
            "1": {"head_dim": 32, "num_key_value_heads": 1},
        },
    }
    wanted = HeadGeometry(num_heads=4, num_kv_heads=1, head_dim=32, values_are_keys=True)
    assert head_geometry(named, GEMMA4) == head_geometry(per_layer, GEMMA4) == wanted
    assert head_geometry(GEMMA, GEMMA4).head_dim == 512
    assert head_geometry({**named, "attention_k_eq_v": False}, GEMMA4) == HeadGeometry(
        4, 2, 32, values_are_keys=False
    )


def test_rope_is_read_from_old_and_new_configs() -> None:
    old, new = (
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    )
    assert (
        rope_settings(old, QWEN3, head_dim=16)
        == rope_settings(new, QWEN3, head_dim=16)
        == RopeSettings(5e5, 8)
    )
    nested = {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
        "sliding_attention": {},
    }
    assert rope_settings({"rope_parameters": nested}, GEMMA4, head_dim=32) == RopeSettings(1e6, 4)
    assert rope_settings({}, GEMMA4, head_dim=32) == RopeSettings(1e6, 4)
    with pytest.raises(ConfigError, match="yarn"):
        rope_settings({"rope_parameters": {"rope_type": "yarn"}}, QWEN3, head_dim=16)
