"""The config.json of a draft in the form that an engine reads, and back to the published form.

Engines count captured layers from the embedding (their id is ours + 1) and lay blocks out in their
own default way. A wrong id or layout serves at about one percent acceptance without any error, so
both are always written out.
"""

from typing import Any

from deepspec.config.families import GEMMA4, QWEN3
from deepspec.export.source import target_name
from deepspec.model.config_json import DFLASH_MODEL, DFLASH_READ, LAYOUT_KEYS, config_from_spec
from deepspec.model.spec import DraftSpec

Config = dict[str, Any]
SPECULATORS = {
    "dspark": "DSparkSpeculator",
    "dflash": "DFlashSpeculator",
    "eagle3": "Eagle3Speculator",
}
# keys of a draft that the speculators format has outside its layer config
SPECULATORS_KEYS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "num_anchors",
    "mask_token_id",
    "eagle_aux_hidden_state_layer_ids",
    "norm_before_residual",
    *LAYOUT_KEYS,
)


def is_engines_dflash(spec: DraftSpec) -> bool:
    """Whether engines know the draft as DFlash: an anchor that predicts nothing, Qwen3's layers."""
    is_context = spec.algorithm == "dflash" and spec.layout == "anchor_is_context"
    return is_context and spec.family is QWEN3


def published_config(spec: DraftSpec, dtype: str) -> Config:
    """The published config.json with all defaults written out; `dtype` is that of the tensors."""
    config = config_from_spec(spec) | {"dtype": dtype, "draft_vocab_size": spec.vocab_size}
    if spec.family is GEMMA4:
        config["rope_parameters"] = spec.text_config.get("rope_parameters") or {
            "full_attention": spec.family.default_rope
        }
    else:
        theta = {"rope_theta": spec.rope.theta}
        config |= theta | {"rope_parameters": theta | {"rope_type": "default"}}
    if spec.algorithm == "eagle3":
        ids = _engine_ids(spec)
        config |= {"eagle_aux_hidden_state_layer_ids": ids, "norm_before_residual": False}
    return config


def engine_config(spec: DraftSpec, dtype: str) -> Config:
    """What vLLM and SGLang read: the published config under their names of the architectures."""
    config = published_config(spec, dtype)
    if spec.algorithm == "eagle3":
        config["architectures"] = ["Eagle3Qwen3ForCausalLM"]
    if is_engines_dflash(spec):
        config |= {"architectures": [DFLASH_MODEL], "block_size": spec.num_queries}
        config["dflash_config"] = {key: config[key] for key in DFLASH_READ}
    return config


def read_engine_config(config: Config) -> Config:
    """The published config, from the keys that vLLM and SGLang read; a published one is its own.

    Raises:
        KeyError: one of them is missing.
    """
    if "eagle_aux_hidden_state_layer_ids" in config:
        ids = [layer - 1 for layer in config["eagle_aux_hidden_state_layer_ids"]]
        return config | {"target_layer_ids": ids}
    return config


def speculators_config(spec: DraftSpec, dtype: str) -> Config:
    """The config of the speculators package: the published one, wrapped."""
    inner = published_config(spec, dtype)
    return {
        "architectures": [SPECULATORS[spec.algorithm]],
        "speculators_model_type": spec.algorithm,
        "transformer_layer_config": inner,
        "speculators_config": {
            "algorithm": spec.algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": spec.block_size}
            ],
            "verifier": {
                "name_or_path": target_name(spec) or None,
                "architectures": spec.text_config["target_architectures"],
            },
        },
        "aux_hidden_state_layer_ids": _engine_ids(spec),
        "draft_vocab_size": spec.vocab_size,
        "dtype": dtype,
        "tie_word_embeddings": False,
        "block_size": spec.num_queries,  # an anchor that predicts nothing counts there
        **({"sliding_window_non_causal": True} if spec.algorithm == "dflash" else {}),
    } | {key: inner[key] for key in SPECULATORS_KEYS if key in inner}


def read_speculators_config(config: Config) -> Config:
    """The published config, from the keys that the speculators package reads.

    Raises:
        KeyError: one of them is missing.
    """
    inner = config["transformer_layer_config"] | {
        "target_layer_ids": [layer - 1 for layer in config["aux_hidden_state_layer_ids"]],
        "block_size": config["speculators_config"]["proposal_methods"][0]["speculative_tokens"],
    }
    if config["speculators_model_type"] != "eagle3":
        inner |= {key: config[key] for key in ("mask_token_id", *LAYOUT_KEYS)}
    return inner


def _engine_ids(spec: DraftSpec) -> list[int]:
    return [layer + 1 for layer in spec.target_layer_ids]
