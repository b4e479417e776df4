"""What each serving engine expects a draft's config.json and tensors to be called, and how to read
that back.

Engines count captured layers from the embedding (their id is ours + 1) and lay blocks out in their
own default way. A wrong id or layout serves at about one percent acceptance without any error, so
both are always written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from deepspec.config.families import GEMMA4
from deepspec.errors import ConfigError
from deepspec.model.config_json import config_from_spec
from deepspec.model.spec import DraftSpec

Engine = Literal["vllm", "sglang", "speculators", "hf"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "speculators", "hf")
# the target's own; an engine takes them from the target
SHARED = ("embed_tokens.weight", "lm_head.weight")
# slot k predicts anchor + 1 + k
LAYOUT = {"sample_from_anchor": True, "dspark_bonus_anchor": False}


def why_not(spec: DraftSpec, engine: Engine) -> str | None:
    """Why no such engine can load this draft (as of mid-2026, read from their sources), or None
    where it can.
    """
    if engine == "hf":
        return None
    is_gemma = spec.family is GEMMA4
    if spec.algorithm == "dspark":
        return _why_not_dspark(spec, engine, is_gemma=is_gemma)
    if is_gemma:
        return f"its {spec.algorithm} model has Qwen3 layers: Gemma4's further norms, V = K and soft-cap would be dropped"
    if spec.algorithm == "eagle3" and engine == "sglang":
        return "its Eagle3 model is LlamaForCausalLMEagle3, which has no q and k norms and reads exactly three layers"
    return None


def _why_not_dspark(spec: DraftSpec, engine: Engine, *, is_gemma: bool) -> str | None:
    if engine == "sglang":
        return "it has no DSpark model for Gemma4" if is_gemma else None
    if spec.markov is None or spec.markov.kind != "vanilla":
        kind = "no" if spec.markov is None else f"a {spec.markov.kind}"
        return f"it computes the vanilla Markov head only, and this draft has {kind} Markov head"
    return (
        "the speculators format describes Qwen3 layers only"
        if is_gemma and engine == "speculators"
        else None
    )


def refuse_unservable(spec: DraftSpec, engine: Engine) -> None:
    """Raise ConfigError: no engine of this name can load such a draft."""
    reason = why_not(spec, engine)
    if reason is not None:
        possible = [name for name in ENGINES if why_not(spec, name) is None]
        what = f"{engine} cannot load this {spec.algorithm} draft for {spec.family.name}: {reason}"
        raise ConfigError(what, where=f"--to {engine}", fix=f"export to {' or '.join(possible)}")


def engine_config(spec: DraftSpec, engine: Engine, *, dtype: str) -> dict[str, Any]:
    """The config.json that `engine` reads; `dtype` is that of the tensors."""
    config = (
        config_from_spec(spec) | _rope(spec) | {"dtype": dtype, "draft_vocab_size": spec.vocab_size}
    )
    engine_ids = [layer + 1 for layer in spec.target_layer_ids]
    if spec.algorithm == "eagle3":
        config |= {"eagle_aux_hidden_state_layer_ids": engine_ids, "norm_before_residual": False}
    if engine == "speculators":
        return _speculators_config(spec, config, engine_ids)
    if engine == "hf":
        return config
    if spec.algorithm == "dflash":
        config |= {"architectures": ["DFlashDraftModel"], "dflash_config": _dflash_section(spec)}
    elif spec.algorithm == "eagle3":
        config["architectures"] = ["Eagle3Qwen3ForCausalLM"]
    return config


def _rope(spec: DraftSpec) -> dict[str, Any]:
    """The rotary embedding, said outright even where the target's config leaves it to a default."""
    if spec.family is not GEMMA4:
        return {
            "rope_theta": spec.rope.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope.theta},
        }
    return {
        "rope_parameters": spec.text_config.get("rope_parameters")
        or {"full_attention": spec.family.default_rope}
    }


def _dflash_section(spec: DraftSpec) -> dict[str, Any]:
    return {
        "target_layer_ids": list(spec.target_layer_ids),
        "num_target_layers": spec.num_target_layers,
        "mask_token_id": spec.mask_token_id,
        "block_size": spec.block_size,
        # Two names of one layout. An engine that knows neither takes slot 0 for the anchor itself;
        # vLLM of mid-2026 refuses the first name, which is better than serving nonsense.
        "sample_from_anchor": True,
        "query_zero_predicts_next": True,
    }


def _speculators_config(
    spec: DraftSpec, config: dict[str, Any], engine_ids: list[int]
) -> dict[str, Any]:
    proposal = {"proposal_type": "greedy", "speculative_tokens": spec.block_size}
    verifier = {"name_or_path": target_name(spec) or None, "architectures": ["Qwen3ForCausalLM"]}
    wrapped: dict[str, Any] = {
        "architectures": [
            {
                "dspark": "DSparkSpeculator",
                "dflash": "DFlashSpeculator",
                "eagle3": "Eagle3Speculator",
            }[spec.algorithm]
        ],
        "speculators_model_type": spec.algorithm,
        "transformer_layer_config": config,
        "speculators_config": {
            "algorithm": spec.algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
        "aux_hidden_state_layer_ids": engine_ids,
        "draft_vocab_size": spec.vocab_size,
        "dtype": config["dtype"],
        "tie_word_embeddings": False,
        "block_size": spec.block_size,
    }
    if spec.algorithm == "eagle3":
        return wrapped | {
            "eagle_aux_hidden_state_layer_ids": engine_ids,
            "norm_before_residual": False,
        }
    keys = (
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
        "num_anchors",
    )
    return (
        wrapped
        | {"mask_token_id": spec.mask_token_id, **LAYOUT}
        | {key: config[key] for key in keys if key in config}
    )


def target_name(spec: DraftSpec) -> str:
    return str(
        spec.text_config.get("target_model_name_or_path")
        or spec.text_config.get("_name_or_path")
        or ""
    )


def engine_tensors(
    spec: DraftSpec, engine: Engine, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors to write, under the names that `engine` reads; all of them keep the published
    names.
    """
    left_out = SHARED if spec.algorithm == "dflash" and engine in ("vllm", "sglang") else ()
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The published config.json behind an engine's, from what that engine would read and nothing
    else.

    Raises:
        KeyError: something that the engine reads is not there.
    """
    if "speculators_model_type" in config:
        inner, algorithm = (
            dict(config["transformer_layer_config"]),
            config["speculators_model_type"],
        )
        inner["target_layer_ids"] = [layer - 1 for layer in config["aux_hidden_state_layer_ids"]]
        inner["block_size"] = config["speculators_config"]["proposal_methods"][0][
            "speculative_tokens"
        ]
        if algorithm != "eagle3":
            inner |= {"mask_token_id": config["mask_token_id"]} | {
                key: config[key] for key in LAYOUT
            }
        return inner
    read = dict(config)
    if "dflash_config" in config:
        section = config["dflash_config"]
        read |= {
            key: section[key]
            for key in ("target_layer_ids", "mask_token_id", "block_size", "sample_from_anchor")
        }
    elif "eagle_aux_hidden_state_layer_ids" in config:
        read["target_layer_ids"] = [
            layer - 1 for layer in config["eagle_aux_hidden_state_layer_ids"]
        ]
    return read
