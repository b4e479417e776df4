"""A draft's config.json in the published form: the target's text config and the draft's own keys.

`spec_from_config(config_from_spec(spec)) == spec`. The form of released DFlash drafts
(`DFlashDraftModel`) is read as well: its own keys are in `dflash_config`, its `block_size` counts
an anchor that predicts nothing, and it has no embedding and no lm_head.
"""

from typing import Any

from deepspec.config.draft import BlockLayout, ConfidenceConfig, MarkovConfig
from deepspec.config.families import HFConfig
from deepspec.errors import ConfigError
from deepspec.model.spec import DraftSpec, dimensions

# Keys of the target's own layers, which would contradict a draft's or mislead a reader; and those
# of another form of drafts.
TARGET_ONLY = ("per_layer_config", "quantization_config", "architectures", "dtype", "torch_dtype")
OTHER_FORM = ("dflash_config", "auto_map")
LAYOUT_KEYS = ("sample_from_anchor", "dspark_bonus_anchor")
DFLASH_MODEL = "DFlashDraftModel"
# of `dflash_config`: those that are read, and those that change nothing
DFLASH_READ = (
    "mask_token_id",
    "target_layer_ids",
    "block_size",
    "num_target_layers",
    "sample_from_anchor",
)
DFLASH_KNOWN = {*DFLASH_READ, "query_zero_predicts_next", "use_aux_hidden_state", "mask_token"}


def spec_from_config(config: HFConfig) -> DraftSpec:
    """The draft that a config.json in the published form describes.

    Raises:
        ConfigError: not a draft's config, or one that names what is not supported.
    """
    architecture = (config.get("architectures") or [""])[0]
    is_eagle3 = "ttt_length" in config or "Eagle3" in architecture
    config = _flattened(config)
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
    _refuse_other_layers(config)
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
    left_out = (*TARGET_ONLY, *OTHER_FORM)
    config = {key: value for key, value in text.items() if key not in left_out} | {
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
        **layout_keys(spec.layout),
    }
    if spec.markov:
        config["markov_head_type"] = spec.markov.kind
    if spec.confidence:
        config["confidence_head_with_markov"] = spec.confidence.markov_features
    return config


def layout_keys(layout: BlockLayout) -> dict[str, bool]:
    """The layout as engines read it.

    They default to different ones, and in a wrong one serve at one percent acceptance without an
    error.
    """
    predicts = layout == "anchor_predicts"
    return dict(zip(LAYOUT_KEYS, (predicts, not predicts), strict=True))


def leaves_frozen_to_target(config: HFConfig) -> bool:
    """Whether a draft with this config.json has no embedding and no lm_head of its own."""
    return DFLASH_MODEL in (config.get("architectures") or ())


def _flattened(config: HFConfig) -> HFConfig:
    """The config with what stands in `dflash_config` beside its other keys."""
    inner = config.get("dflash_config") or {}
    unknown = sorted(key for key, value in inner.items() if value and key not in DFLASH_KNOWN)
    if unknown:
        raise ConfigError(
            f"this DFlash draft has parts that are not computed here: {', '.join(unknown)}",
            where="config.json: dflash_config",
            fix="choose a draft of full-attention layers without them",
        )
    return {**config, **{key: inner[key] for key in DFLASH_READ if inner.get(key) is not None}}


def _refuse_other_layers(config: HFConfig) -> None:
    """A draft's layers are full attention, over all of its target's tokens and states."""
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    sizes = {"draft_vocab_size": "vocab_size", "target_hidden_size": "hidden_size"}
    differing = [
        key for key, own in sizes.items() if config.get(key) not in (None, config.get(own))
    ]
    what = [f"layers of {kind}" for kind in sorted(kinds)]
    what += ["causal attention within a block"] if config.get("is_causal") else []
    what += [f"a {key} of its own ({config[key]})" for key in differing]
    if what:
        raise ConfigError(
            f"drafts with {' and '.join(what)} are not supported",
            where="config.json",
            fix="choose a draft of full-attention layers with the target's sizes",
        )


def _layout(config: HFConfig) -> BlockLayout:
    """The layout that a block draft's config names, or else the one that its form has."""
    bonus = config.get("dspark_bonus_anchor")
    named = {config.get("sample_from_anchor"), None if bonus is None else not bonus} - {None}
    if len(named) > 1:
        raise ConfigError(
            "sample_from_anchor and dspark_bonus_anchor name different layouts",
            where="config.json",
            fix="give the config.json that was saved with the weights",
        )
    predicts = named.pop() if named else not leaves_frozen_to_target(config)
    return "anchor_predicts" if predicts else "anchor_is_context"


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
    layout, block_size = _layout(config), config["block_size"]
    if layout == "anchor_is_context" and leaves_frozen_to_target(config):
        block_size -= 1
    return {
        "algorithm": "dspark" if markov or confidence else "dflash",
        "layout": layout,
        "block_size": block_size,
        "mask_token_id": config["mask_token_id"],
        "num_anchors": config.get("num_anchors") or 512,
        "markov": markov,
        "confidence": confidence,
    }
