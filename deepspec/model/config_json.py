"""A draft's config.json in the published form: the target's text config and the draft's own keys.

`spec_from_config(config_from_spec(spec)) == spec`.
"""

from typing import Any

from deepspec.config.draft import ConfidenceConfig, MarkovConfig
from deepspec.config.families import HFConfig
from deepspec.errors import ConfigError
from deepspec.model.spec import DraftSpec, dimensions

# Keys of the target's own layers, which would contradict a draft's or mislead a reader.
TARGET_ONLY = ("per_layer_config", "quantization_config", "architectures", "dtype", "torch_dtype")
# Slot k predicts anchor + 1 + k. Engines default to other layouts, and then serve at one percent
# acceptance without an error.
BLOCK_LAYOUT = {"sample_from_anchor": True, "dspark_bonus_anchor": False}


def spec_from_config(config: HFConfig) -> DraftSpec:
    """The draft that a config.json in the published form describes.

    Raises:
        ConfigError: not a draft's config, or one that names what is not supported.
    """
    architecture = (config.get("architectures") or [""])[0]
    is_eagle3 = "ttt_length" in config or "Eagle3" in architecture
    needed = ["target_layer_ids", "num_target_layers", "num_hidden_layers"]
    if not is_eagle3:
        needed += ["block_size", "mask_token_id"]
    missing = [key for key in needed if config.get(key) is None]
    if missing:
        raise ConfigError(
            f"this is no draft's config: {', '.join(missing)} missing",
            where="config.json",
            fix="give the folder of a draft, not of a target",
        )
    fields = dimensions(config)
    if is_eagle3:
        steps = config.get("ttt_length") or 7
        fields |= {
            "algorithm": "eagle3",
            "block_size": config.get("block_size", steps),
            "ttt_length": steps,
            "step_loss_decay": config.get("step_loss_decay", 0.8),
        }
    else:
        fields |= _block_fields(config)
    return DraftSpec(
        num_layers=config["num_hidden_layers"],
        num_target_layers=config["num_target_layers"],
        target_layer_ids=tuple(config["target_layer_ids"]),
        text_config=dict(config),
        **fields,
    )


def config_from_spec(spec: DraftSpec) -> dict[str, Any]:
    """The config.json of a draft."""
    family, text, is_eagle3 = spec.family, spec.text_config, spec.algorithm == "eagle3"
    config = {key: value for key, value in text.items() if key not in TARGET_ONLY} | {
        "architectures": [family.eagle3_architecture if is_eagle3 else family.block_architecture],
        "num_target_layers": spec.num_target_layers,
        "num_hidden_layers": spec.num_layers,
        "target_layer_ids": list(spec.target_layer_ids),
        "layer_types": ["full_attention"] * spec.num_layers,
        "block_size": spec.block_size,
        "tie_word_embeddings": False,
    }
    if family.global_head_dim is None:  # Gemma4's wrapper needs naming, Qwen3 has none
        config.pop("target_model_type", None)
        config.pop("target_text_model_type", None)
    else:
        config["global_head_dim"] = spec.heads.head_dim
        if spec.heads.values_are_keys:
            config["num_global_key_value_heads"] = spec.heads.num_kv_heads
    if is_eagle3:
        name = text.get("target_model_name_or_path") or text.get("_name_or_path", "")
        return config | {
            "ttt_length": spec.ttt_length,
            "step_loss_decay": spec.step_loss_decay,
            "draft_num_hidden_layers": spec.num_layers,
            "target_model_name_or_path": name,
        }
    config |= {
        "mask_token_id": spec.mask_token_id,
        "num_anchors": spec.num_anchors,
        "markov_rank": spec.markov.rank if spec.markov else 0,
        "enable_confidence_head": spec.confidence is not None,
        **BLOCK_LAYOUT,
    }
    if spec.markov:
        config["markov_head_type"] = spec.markov.kind
    if spec.confidence:
        config["confidence_head_with_markov"] = spec.confidence.markov_features
    return config


def _block_fields(config: HFConfig) -> dict[str, Any]:
    markov = confidence = None
    if config.get("markov_rank"):
        kind = config.get("markov_head_type", "vanilla")
        markov = MarkovConfig(rank=config["markov_rank"], kind=kind)
    if config.get("enable_confidence_head"):
        with_markov = bool(config.get("confidence_head_with_markov", False))
        confidence = ConfidenceConfig(markov_features=with_markov)
        if with_markov and markov is None:
            raise ConfigError(
                "confidence_head_with_markov needs markov_rank above 0",
                where="config.json",
                fix="set one of the two",
            )
    return {
        "algorithm": "dspark" if markov or confidence else "dflash",
        "block_size": config["block_size"],
        "mask_token_id": config["mask_token_id"],
        "num_anchors": config.get("num_anchors") or 512,
        "markov": markov,
        "confidence": confidence,
    }
