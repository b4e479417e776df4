"""What SGLang 0.5.23 reads of a folder for DSPARK, from its published source: every name, shape and
config key of `srt/models/dspark.py`, `srt/models/dflash.py` and
`srt/speculative/dspark_components/dspark_config.py`. It cannot run here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from deepspec.export.export import export_draft
from deepspec.model.checkpoint import save_draft
from tests.model.drafts import CONFIGS, make_draft

# of the target, which are skipped
SKIPPED = {"embed_tokens.weight", "lm_head.weight"}
# read with a default that is another draft's: they must be there
READ = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "layer_types": ["full_attention", "full_attention"],
    "rope_theta": 10000.0,
    "num_target_layers": 5,
    "target_layer_ids": [0, 1, 2],
    "mask_token_id": 60,
    "block_size": 4,
    "sample_from_anchor": True,
    "dtype": "float32",
}
# those that would make another model of it
ABSENT = ("dflash_config", "dspark_config", "text_config", "use_gemma_norm", "is_causal")


def parameters(config: dict[str, Any]) -> dict[str, list[int]]:
    """Its parameters by name; q, k and v, and gate and up, are those that it merges at loading."""
    size, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    values = config["num_key_value_heads"] * config["head_dim"]
    vocabulary, rank = config["vocab_size"], config["markov_rank"]
    found = {
        "fc.weight": [size, len(config["target_layer_ids"]) * size],
        "hidden_norm.weight": [size],
        "norm.weight": [size],
        "markov_head.markov_w1.weight": [vocabulary, rank],
        "markov_head.markov_w2.weight": [vocabulary, rank],
    }
    for number in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj.weight": [queries, size],
            "self_attn.k_proj.weight": [values, size],
            "self_attn.v_proj.weight": [values, size],
            "self_attn.o_proj.weight": [size, queries],
            "self_attn.q_norm.weight": [config["head_dim"]],
            "self_attn.k_norm.weight": [config["head_dim"]],
            "mlp.gate_proj.weight": [inner, size],
            "mlp.up_proj.weight": [inner, size],
            "mlp.down_proj.weight": [size, inner],
            "input_layernorm.weight": [size],
            "post_attention_layernorm.weight": [size],
        }
        found |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    if config["markov_head_type"] == "gated":
        found |= {
            "markov_head.gate_proj.weight": [rank, size + rank],
            "markov_head.gate_proj.bias": [rank],
        }
    if config["markov_head_type"] == "rnn":
        found |= {
            "markov_head.joint_proj.weight": [3 * rank, 2 * rank + size],
            "markov_head.joint_proj.bias": [3 * rank],
        }
    if config["enable_confidence_head"]:
        width = size + (rank if config["confidence_head_with_markov"] else 0)
        found |= {"confidence_head.proj.weight": [1, width], "confidence_head.proj.bias": [1]}
    return found


@pytest.mark.parametrize("name", ["dflash", "vanilla", "gated", "rnn", "confidence_alone"])
def test_a_folder_has_every_tensor_and_key_that_sglang_reads_and_no_other(
    name: str, tmp_path: Path
):
    """A tensor of the heads that it does not know is an error there, one of the layers that it
    lacks is none: those weights stay as they were made.
    """
    save_draft(make_draft(CONFIGS[name], lowest=0), tmp_path / "draft")
    export_draft(tmp_path / "draft", engine="sglang", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config.get(key) for key in READ} == READ
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["markov_rank"] > 0
    assert config["markov_head_type"] in ("vanilla", "gated", "rnn")
    assert not set(ABSENT) & set(config)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert set(shapes) - set(parameters(config)) == SKIPPED
    assert {name: shapes[name] for name in set(shapes) - SKIPPED} == parameters(config)
