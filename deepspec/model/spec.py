"""Everything that decides the shape of a draft; `config_json` reads and writes it as a file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deepspec.config.draft import (
    BlockDraftConfig,
    BlockLayout,
    ConfidenceConfig,
    Eagle3DraftConfig,
    MarkovConfig,
    num_queries,
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


@dataclass(frozen=True, kw_only=True)
class DraftSpec:
    """Dimensions and settings of a draft.

    Raises:
        ConfigError: they contradict each other, or name what drafts do not have.
    """

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
    mask_token_id: int | None = None  # block drafters only
    block_size: int  # tokens proposed per round
    layout: BlockLayout = "anchor_predicts"  # block drafters only
    num_anchors: int = 0  # drawn per sample and training step; block drafters only
    markov: MarkovConfig | None = None
    confidence: ConfidenceConfig | None = None
    ttt_length: int = 0  # training-time-test steps; Eagle3 only
    step_loss_decay: float = 1.0
    # what the draft's config.json is built on
    text_config: HFConfig = field(repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        self._check_layers()
        if self.block_size < 1 or self.num_layers < 1:
            raise ConfigError(
                f"a draft cannot have {self.num_layers} layers and propose {self.block_size} tokens"
                " per round",
                where="draft.block_size, draft.num_layers",
                fix="choose at least 1 of each",
            )
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise ConfigError(
                f"mask token {self.mask_token_id} is outside the target's vocabulary of"
                f" {self.vocab_size} tokens",
                where="target.mask_token_id",
                fix=f"choose an unused token id from 0 to {self.vocab_size - 1}",
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation {self.activation!r} is not supported",
                where=f"config.json: {self.family.activation_key}",
                fix=f"known are: {', '.join(ACTIVATIONS)}",
            )

    def _check_layers(self) -> None:
        layer_ids, last = self.target_layer_ids, self.num_target_layers - 1
        lowest = 0 if self.algorithm == "eagle3" else -1
        wrong = [layer for layer in layer_ids if not lowest <= layer < last]
        if list(layer_ids) != sorted(set(layer_ids)) or not layer_ids:
            what = f"layers {list(layer_ids)} are not ascending"
        elif last in layer_ids:
            what = (
                f"layer {last} is the target's last one: its output is normed on some paths and raw"
                " on others, so training and decoding would disagree"
            )
        elif wrong:
            what = f"a target of {last + 1} layers has no layers {wrong} to capture"
            if wrong == [-1]:
                what += "; eagle3 cannot read the embedding output"
        else:
            return
        fix = f"choose ascending layers from {lowest} to {last - 1}"
        raise ConfigError(what, where="target.layer_ids", fix=fix)

    @property
    def num_context_features(self) -> int:
        """Width m * D of the context: the captured layers side by side."""
        return len(self.target_layer_ids) * self.hidden_size

    @property
    def num_queries(self) -> int:
        """Inputs of a block (of Eagle3: its passes)."""
        return num_queries(self.block_size, self.layout)

    @property
    def attention_scale(self) -> float:
        """Factor on the scores of attention."""
        return 1.0 if self.family.unscaled_attention else self.heads.head_dim**-0.5

    @classmethod
    def from_target(
        cls,
        target_config: HFConfig,
        draft: BlockDraftConfig | Eagle3DraftConfig,
        *,
        layer_ids: Sequence[int],
        mask_token_id: int | None = None,
    ) -> "DraftSpec":
        """A draft for the target whose config.json is given; `layer_ids` as in `target.layer_ids`.

        The draft's own config keeps what the target is called (`_name_or_path` of that file), its
        architectures and its number format.

        Raises:
            ConfigError: an unsupported target, a layer or token that it does not have.
        """
        text, is_eagle3 = text_config(target_config), isinstance(draft, Eagle3DraftConfig)
        if mask_token_id is None and not is_eagle3:
            raise ConfigError(
                "a block draft needs a mask token",
                where="target.mask_token_id",
                fix="choose an unused token id",
            )
        name, architectures, dtype = (
            target_config.get(key) or text.get(key)
            for key in ("_name_or_path", "architectures", "dtype")
        )
        return cls(
            mask_token_id=None if is_eagle3 else mask_token_id,
            num_target_layers=text["num_hidden_layers"],
            target_layer_ids=tuple(layer_ids),
            text_config={
                **text,
                "_name_or_path": name or "",
                **({"target_architectures": architectures} if architectures else {}),
                **({"target_dtype": dtype} if dtype else {}),
                "target_model_type": target_config.get("model_type", ""),
                "target_text_model_type": text.get("model_type", ""),
            },
            **dict(draft),
            **dimensions(target_config),
        )


def dimensions(config: HFConfig) -> dict[str, Any]:
    """The fields of a spec that target and draft have in common, from the config.json of either.

    Raises:
        ConfigError: a family that is not supported, or a size that is missing.
    """
    family, text = family_of(config), text_config(config)
    sizes = ("vocab_size", "hidden_size", "intermediate_size")
    missing = [key for key in (*sizes, "num_attention_heads") if not text.get(key)]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} missing or 0",
            where="config.json",
            fix="give the config.json that belongs to the weights",
        )
    heads = head_geometry(text, family)
    return {
        **{size: text[size] for size in sizes},
        "family": family,
        "heads": heads,
        "rope": rope_settings(text, family, head_dim=heads.head_dim),
        "rms_norm_eps": text.get("rms_norm_eps", 1e-6),
        "activation": text.get(family.activation_key, "silu"),
        "logit_softcap": text.get("final_logit_softcapping"),
        "initializer_range": text.get("initializer_range", 0.02),
    }
