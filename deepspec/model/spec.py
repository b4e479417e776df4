"""Everything that decides the shape of a draft: made from a target's config.json, written to
and read from its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deepspec.config.draft import (
    BlockDraftConfig,
    ConfidenceConfig,
    Eagle3DraftConfig,
    MarkovConfig,
)
from deepspec.config.families import (
    Family,
    HeadGeometry,
    HFConfig,
    RopeSettings,
    family_of,
    head_geometry,
    rope_settings,
    text_config,
)
from deepspec.errors import ConfigError

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
# Describe the target's own layers; in a draft's config they would contradict its layers or mislead
# a reader.
TARGET_ONLY = ("per_layer_config", "quantization_config", "architectures", "dtype", "torch_dtype")


@dataclass(frozen=True, kw_only=True)
class DraftSpec:
    """Dimensions and settings of a draft; `DraftSpec.from_config(spec.to_config()) == spec`."""

    algorithm: Literal["dspark", "dflash", "eagle3"]
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: HeadGeometry
    rope: RopeSettings
    rms_norm_eps: float
    activation: str
    logit_softcap: float | None  # logits are c * tanh(logits / c)
    initializer_range: float  # standard deviation of fresh weights
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    mask_token_id: int | None  # block drafters only
    block_size: int  # tokens proposed per round
    num_anchors: int = 0  # drawn per sample and training step; block drafters only
    markov: MarkovConfig | None = None
    confidence: ConfidenceConfig | None = None
    ttt_length: int = 0  # training-time-test steps; Eagle3 only
    step_loss_decay: float = 1.0
    # what the draft's config.json is built on
    text_config: HFConfig = field(repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        _check_layers(
            self.target_layer_ids,
            self.num_target_layers,
            lowest=0 if self.algorithm == "eagle3" else -1,
        )
        if self.block_size < 1 or self.num_layers < 1:
            what = f"a draft of {self.num_layers} layers that proposes {self.block_size} tokens per round cannot be"
            raise ConfigError(
                what, where="draft.block_size, draft.num_layers", fix="choose at least 1 of each"
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            what = f"mask token {self.mask_token_id} is outside the target's vocabulary of {self.vocab_size} tokens"
            raise ConfigError(
                what,
                where="target.mask_token_id",
                fix=f"choose an unused token id from 0 to {self.vocab_size - 1}",
            )
        if self.activation not in ACTIVATIONS:
            where = f"config.json: {self.family.activation_key}"
            raise ConfigError(
                f"activation {self.activation!r} is not supported",
                where=where,
                fix=f"known are: {', '.join(ACTIVATIONS)}",
            )

    @property
    def num_context_features(self) -> int:
        """Width m * D of the context: the captured layers side by side."""
        return len(self.target_layer_ids) * self.hidden_size

    @classmethod
    def from_target(
        cls,
        target_config: HFConfig,
        draft: BlockDraftConfig | Eagle3DraftConfig,
        *,
        layer_ids: Sequence[int],
        mask_token_id: int | None = None,
    ) -> DraftSpec:
        """A draft for the target whose config.json is given; `layer_ids` as in `target.layer_ids`.

        Raises:
            ConfigError: an unsupported target, a layer or token that it does not have.
        """
        text = text_config(target_config)
        settings: dict[str, Any] = {
            "algorithm": draft.algorithm,
            "num_layers": draft.num_layers,
            "block_size": draft.block_size,
            "num_target_layers": text["num_hidden_layers"],
            "target_layer_ids": tuple(layer_ids),
        }
        if isinstance(draft, Eagle3DraftConfig):
            settings |= {
                "mask_token_id": None,
                "ttt_length": draft.ttt_length,
                "step_loss_decay": draft.step_loss_decay,
            }
        elif mask_token_id is None:
            raise ConfigError(
                "a block draft needs a mask token",
                where="target.mask_token_id",
                fix="choose an unused token id",
            )
        else:
            settings |= {"mask_token_id": mask_token_id, "num_anchors": draft.num_anchors}
            settings |= {"markov": draft.markov, "confidence": draft.confidence}
        base = dict(text)
        base["_name_or_path"] = (
            target_config.get("_name_or_path") or text.get("_name_or_path") or ""
        )
        base["target_model_type"] = target_config.get("model_type", "")
        base["target_text_model_type"] = text.get("model_type", "")
        return cls(**_dimensions(target_config), **settings, text_config=base)

    @classmethod
    def from_config(cls, config: HFConfig) -> DraftSpec:
        """The draft that a config.json in the published form describes.

        Raises:
            ConfigError: not a draft's config, or one that names what is not supported.
        """
        architecture = (config.get("architectures") or [""])[0]
        is_eagle3 = "ttt_length" in config or "Eagle3" in architecture
        needed = ["target_layer_ids", "num_target_layers", "num_hidden_layers"] + (
            [] if is_eagle3 else ["block_size", "mask_token_id"]
        )
        missing = [key for key in needed if config.get(key) is None]
        if missing:
            what = f"this is no draft's config: {', '.join(missing)} missing"
            raise ConfigError(
                what, where="config.json", fix="give the folder of a draft, not of a target"
            )
        read = _eagle3_settings if is_eagle3 else _block_settings
        common = {
            "num_layers": config["num_hidden_layers"],
            "num_target_layers": config["num_target_layers"],
            "target_layer_ids": tuple(config["target_layer_ids"]),
        }
        return cls(**_dimensions(config), **common, **read(config), text_config=dict(config))

    def to_config(self) -> dict[str, Any]:
        """The draft's config.json: the target's text config plus the published keys of the
        algorithm.
        """
        base = {key: value for key, value in self.text_config.items() if key not in TARGET_ONLY}
        base |= {
            "architectures": [
                self.family.eagle3_architecture
                if self.algorithm == "eagle3"
                else self.family.block_architecture
            ],
            "num_target_layers": self.num_target_layers,
            "num_hidden_layers": self.num_layers,
            "target_layer_ids": list(self.target_layer_ids),
            "layer_types": ["full_attention"] * self.num_layers,
            "block_size": self.block_size,
            "tie_word_embeddings": False,
        }
        if self.family.global_head_dim is not None:
            base |= {"global_head_dim": self.heads.head_dim}
            base |= (
                {"num_global_key_value_heads": self.heads.num_kv_heads}
                if self.heads.values_are_keys
                else {}
            )
        else:  # Gemma4's wrapper needs naming, Qwen3 has none
            base.pop("target_model_type", None)
            base.pop("target_text_model_type", None)
        return base | (self._eagle3_keys() if self.algorithm == "eagle3" else self._block_keys())

    def _block_keys(self) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "mask_token_id": self.mask_token_id,
            "num_anchors": self.num_anchors,
            "markov_rank": self.markov.rank if self.markov else 0,
            "enable_confidence_head": self.confidence is not None,
            # Slot k predicts anchor + 1 + k. Engines default to other layouts and then serve at 1 %
            # acceptance, silently.
            "sample_from_anchor": True,
            "dspark_bonus_anchor": False,
        }
        if self.markov:
            keys["markov_head_type"] = self.markov.kind
        if self.confidence:
            keys["confidence_head_with_markov"] = self.confidence.markov_features
        return keys

    def _eagle3_keys(self) -> dict[str, Any]:
        return {
            "ttt_length": self.ttt_length,
            "step_loss_decay": self.step_loss_decay,
            "draft_num_hidden_layers": self.num_layers,
            "target_model_name_or_path": self.text_config.get("target_model_name_or_path")
            or self.text_config.get("_name_or_path", ""),
        }


def _dimensions(config: HFConfig) -> dict[str, Any]:
    """What target and draft have in common, from the config.json of either."""
    family, text = family_of(config), text_config(config)
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
        if not text.get(key)
    ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} missing or 0",
            where="config.json",
            fix="give the config.json that belongs to the weights",
        )
    heads = head_geometry(text, family)
    return {
        "family": family,
        "vocab_size": text["vocab_size"],
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "heads": heads,
        "rope": rope_settings(text, family, head_dim=heads.head_dim),
        "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
        "activation": text.get(family.activation_key, "silu"),
        "logit_softcap": text.get("final_logit_softcapping"),
        "initializer_range": text.get("initializer_range", 0.02),
    }


def _block_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    rank = config.get("markov_rank") or 0
    markov = (
        MarkovConfig(rank=rank, kind=config.get("markov_head_type", "vanilla")) if rank else None
    )
    confidence = None
    if config.get("enable_confidence_head"):
        confidence = ConfidenceConfig(
            markov_features=bool(config.get("confidence_head_with_markov", False))
        )
        if confidence.markov_features and markov is None:
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


def _eagle3_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    steps = config.get("ttt_length") or 7
    return {
        "algorithm": "eagle3",
        "block_size": config.get("block_size", steps),
        "mask_token_id": None,
        "ttt_length": steps,
        "step_loss_decay": config.get("step_loss_decay", 0.8),
    }


def _check_layers(layer_ids: Sequence[int], num_layers: int, *, lowest: int) -> None:
    where, fix = "target.layer_ids", f"choose ascending layers from {lowest} to {num_layers - 2}"
    if list(layer_ids) != sorted(set(layer_ids)) or not layer_ids:
        raise ConfigError(f"layers {list(layer_ids)} are not ascending", where=where, fix=fix)
    if num_layers - 1 in layer_ids:
        what = f"layer {num_layers - 1} is the target's last one: its output is normed on some paths and raw on others, "
        what += "so training and decoding would disagree"
        raise ConfigError(what, where=where, fix=fix)
    wrong = [layer for layer in layer_ids if not lowest <= layer < num_layers - 1]
    if wrong:
        why = "; eagle3 cannot read the embedding output" if wrong == [-1] else ""
        raise ConfigError(
            f"a target of {num_layers} layers has no layers {wrong} to capture{why}",
            where=where,
            fix=fix,
        )
