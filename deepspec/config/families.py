"""The two model families as records: all in which Qwen3 and Gemma4 differ for a draft.

A target is described by its Hugging Face `config.json` as a dictionary; nothing here loads a model.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from deepspec.errors import ConfigError

HFConfig = Mapping[str, Any]


class Family(NamedTuple):
    """In what a model family differs for a draft."""

    name: Literal["qwen3", "gemma4"]
    # `model_type` of the text config; the wrapper's first where the text config is nested
    model_types: tuple[str, ...]
    chat_family: Literal["qwen", "gemma4"]
    block_architecture: str  # `architectures` of a DSpark or DFlash draft
    eagle3_architecture: str
    activation_key: str  # key of the MLP's activation in config.json
    default_rope: dict[str, Any]  # of full-attention layers, where the config does not say
    sandwich_norms: bool = (
        False  # a norm also after attention and after the MLP, before each residual sum
    )
    # softmax(q k) instead of softmax(q k / sqrt(head_dim)); the q and k norms carry the scale
    unscaled_attention: bool = False
    value_norm: bool = False  # values are RMS-normed, without a learned scale
    scaled_embeddings: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    layer_scalar: bool = False  # each layer's output is multiplied by a stored constant
    # full-attention layers have heads of their own, this wide unless the config says otherwise
    global_head_dim: int | None = None


QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    chat_family="qwen",
    block_architecture="Qwen3DSparkModel",
    eagle3_architecture="Qwen3Eagle3Model",
    activation_key="hidden_act",
    default_rope={"rope_type": "default", "rope_theta": 1_000_000.0},
)
GEMMA4 = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    chat_family="gemma4",
    block_architecture="Gemma4DSparkModel",
    eagle3_architecture="Gemma4Eagle3Model",
    activation_key="hidden_activation",
    default_rope={
        "rope_type": "proportional",
        "rope_theta": 1_000_000.0,
        "partial_rotary_factor": 0.25,
    },
    sandwich_norms=True,
    unscaled_attention=True,
    value_norm=True,
    scaled_embeddings=True,
    layer_scalar=True,
    global_head_dim=512,
)
FAMILIES = (QWEN3, GEMMA4)


class HeadGeometry(NamedTuple):
    """Attention heads of a full-attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    values_are_keys: bool  # V = K: there is no value projection


class RopeSettings(NamedTuple):
    """Rotary embedding of a full-attention layer: the first pairs are rotated, the others not."""

    theta: float
    num_rotated: int  # of head_dim / 2 pairs


def text_config(hf_config: HFConfig) -> HFConfig:
    """The language model's part of a target's config: `text_config` of a multimodal wrapper."""
    nested = hf_config.get("text_config")
    return nested if isinstance(nested, Mapping) else hf_config


def family_of(hf_config: HFConfig) -> Family:
    """The family of a target's (or a draft's) config.json.

    Raises:
        ConfigError: a family unknown here, or a member with parts that a draft does not have.
    """
    text = text_config(hf_config)
    model_type = text.get("model_type") or hf_config.get("model_type")
    family = next((family for family in FAMILIES if model_type in family.model_types), None)
    if family is None:
        raise ConfigError(
            f"no draft is known for targets of type {model_type!r}",
            where="config.json: model_type",
            fix=f"known are: {', '.join(QWEN3.model_types + GEMMA4.model_types)}",
        )
    for key, what in {
        "enable_moe_block": "mixture-of-experts blocks",
        "hidden_size_per_layer_input": "per-layer inputs",
        "attention_bias": "attention biases",
    }.items():
        if text.get(key):
            raise ConfigError(
                f"targets with {what} are not supported",
                where=f"config.json: {key} = {text[key]!r}",
                fix="choose a dense target without them (Qwen3 4B, 8B, 14B; Gemma4 12B)",
            )
    return family


def head_geometry(text: HFConfig, family: Family) -> HeadGeometry:
    """Heads of the target's full-attention layers, which is what a draft's layers are.

    Gemma4 writes the geometry of its global layers as `global_head_dim` and
    `num_global_key_value_heads`, newer Transformers as `per_layer_config` of each such layer.
    """
    num_heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or num_heads
    head_dim = text.get("head_dim") or text["hidden_size"] // num_heads
    if family.global_head_dim is None:
        return HeadGeometry(num_heads, kv_heads, head_dim, values_are_keys=False)
    values_are_keys = bool(text.get("attention_k_eq_v"))
    of_layer = _global_layer(text)
    head_dim = text.get("global_head_dim") or of_layer.get("head_dim") or family.global_head_dim
    if values_are_keys:  # only then does Gemma4 read the number of global key-value heads
        kv_heads = (
            text.get("num_global_key_value_heads")
            or of_layer.get("num_key_value_heads")
            or kv_heads
        )
    return HeadGeometry(num_heads, kv_heads, head_dim, values_are_keys)


def _global_layer(text: HFConfig) -> Mapping[str, Any]:
    kinds = dict(enumerate(text.get("layer_types") or ()))
    overrides = text.get("per_layer_config") or {}
    of_global = (overrides[key] for key in overrides if kinds.get(int(key)) == "full_attention")
    return next(of_global, {})


def rope_settings(text: HFConfig, family: Family, *, head_dim: int) -> RopeSettings:
    """Rotary embedding of the full-attention layers.

    Old configs have `rope_theta`, new ones `rope_parameters`.

    Raises:
        ConfigError: a rope type that drafts do not compute (yarn, linear, ...).
    """
    given: Mapping[str, Any] = text.get("rope_parameters") or text.get("rope_scaling") or {}
    given = given.get("full_attention", given)
    rope = given or family.default_rope
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "proportional"):
        raise ConfigError(
            f"rope type {kind!r} is not supported",
            where="config.json: rope_parameters",
            fix="use the target's config without long-context rope scaling",
        )
    theta = given.get("rope_theta") or text.get("rope_theta") or family.default_rope["rope_theta"]
    share = rope.get("partial_rotary_factor", 1.0) if kind == "proportional" else 1.0
    return RopeSettings(float(theta), int(share * head_dim // 2))
