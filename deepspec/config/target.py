"""The sections of a run that describe its target model, and the tiny one of the demo."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from deepspec.config.section import Section


class DemoConfig(Section):
    """The embedded demo: a tiny target, trained from scratch on text of the Python installation."""

    seed: int = 0
    """Seed of the corpus and of the target's weights."""
    conversations: PositiveInt = 10_500
    """Conversations to make, over all three domains."""
    vocab_size: PositiveInt = 1024
    """Tokens of the byte-pair tokenizer."""
    num_layers: PositiveInt = 12
    """Decoder layers of the target."""
    hidden_size: PositiveInt = 96
    """Width of the target."""
    steps: PositiveInt = 200
    """Optimizer steps of the target's training."""
    batch_tokens: PositiveInt = 1200
    """Tokens per optimizer step, padding included."""
    lr: PositiveFloat = 0.02
    """Peak learning rate of the matrices (Muon, cosine); embedding and norms take half of it
    (AdamW).
    """
    held_out: PositiveInt = 20
    """Held-out benchmark prompts per domain."""


class TargetConfig(Section):
    """The target model, and which of its hidden states a draft reads."""

    model: str
    """Hugging Face name or local folder of the target model; `demo` is the target that the demo
    stage trains.
    """
    revision: str | None = None
    """Commit or tag of the model on the hub; null for a local folder."""
    chat_family: Literal["qwen", "gemma4"]
    """Family of the chat template: how it marks turns."""
    thinking: bool = False
    """Whether the chat template switches thinking on."""
    layer_ids: tuple[int, ...] = Field(min_length=1)
    """Decoder layers (0-based) whose outputs are captured; -1 is the embedding output; never
    the last layer.
    """
    mask_token_id: int = Field(ge=0)
    """Token id that stands for a position not drafted yet."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format that the target computes in."""

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        if list(self.layer_ids) != sorted(set(self.layer_ids)) or self.layer_ids[0] < -1:
            raise ValueError("layer_ids must be ascending, without repeats, and at least -1")
        return self
