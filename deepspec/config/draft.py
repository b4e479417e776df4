"""The sections of a run about its draft model: architecture, loss, training."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from deepspec.config.section import Section


class MarkovConfig(Section):
    """The Markov head: a low-rank transition table over the previous token."""

    rank: PositiveInt = 256
    """Rank of the transition table."""
    kind: Literal["vanilla", "gated", "rnn"] = "vanilla"
    """Form of the head (DSpark eq. 5-6)."""


class ConfidenceConfig(Section):
    """The confidence head: how likely each proposed token is to be accepted."""

    markov_features: bool = True
    """Whether the head also sees the Markov embedding of the previous token."""
    detach: bool = False
    """Whether the confidence loss stops at the head instead of reaching the backbone."""


BlockLayout = Literal["anchor_predicts", "anchor_is_context"]


def num_queries(block_size: int, layout: BlockLayout) -> int:
    """Inputs of a block that proposes `block_size` tokens."""
    return block_size + (layout == "anchor_is_context")


class BlockDraftConfig(Section):
    """A draft that proposes a whole block in one forward pass."""

    algorithm: Literal["dspark", "dflash"]
    """`dflash` is the backbone alone; `dspark` adds the Markov and the confidence head."""
    layout: BlockLayout = "anchor_predicts"
    """What a block's inputs predict. `anchor_predicts`: the anchor and `block_size` - 1 mask
    tokens, each of which predicts the token after it. `anchor_is_context`: the anchor, which
    predicts nothing, and `block_size` mask tokens, each of which predicts the token in its own
    place; released DFlash drafts are such, and engines know them as `DFlashDraftModel`.
    """
    block_size: PositiveInt = 7
    """Tokens proposed per round, in either layout. Released DFlash drafts count the anchor as
    well: their 16 is 15 here.
    """
    num_layers: PositiveInt = 5
    """Decoder layers of the draft."""
    num_anchors: PositiveInt = 512
    """Anchors drawn per sample and step in training."""
    markov: MarkovConfig | None = None
    """Markov head, or null."""
    confidence: ConfidenceConfig | None = None
    """Confidence head, or null."""

    @property
    def num_queries(self) -> int:
        """Inputs of a block: the tokens that it proposes, and an anchor that predicts nothing."""
        return num_queries(self.block_size, self.layout)

    def num_slots(self, num_supervised: int) -> int:
        """Inputs of all blocks in a training step, of a sample of so many supervised tokens."""
        return min(self.num_anchors, num_supervised) * self.num_queries

    @model_validator(mode="after")
    def _heads_match_the_algorithm(self) -> Self:
        if self.algorithm == "dflash" and (self.markov or self.confidence):
            raise ValueError(
                "dflash has no heads: leave draft.markov and draft.confidence out, or choose dspark"
            )
        if self.confidence and self.confidence.markov_features and not self.markov:
            raise ValueError("draft.confidence.markov_features needs draft.markov")
        return self


class Eagle3DraftConfig(Section):
    """A draft that proposes token by token: one decoder layer fed with its own outputs."""

    algorithm: Literal["eagle3"]
    """Always `eagle3`."""
    block_size: PositiveInt = 7
    """Tokens proposed per round."""
    num_layers: Literal[1] = 1
    """Decoder layers of the draft."""
    ttt_length: PositiveInt = 7
    """Training-time-test steps."""
    step_loss_decay: float = Field(default=0.8, gt=0, le=1)
    """Weight of each step relative to the one before."""

    def num_slots(self, num_supervised: int) -> int:
        """Tokens predicted in a training step for a sample of so many supervised tokens."""
        return num_supervised * self.ttt_length


DraftConfig = Annotated[BlockDraftConfig | Eagle3DraftConfig, Field(discriminator="algorithm")]


class LossConfig(Section):
    """Weights of the terms of DSpark eq. 9-12; eagle3 uses its own soft cross-entropy and none
    of these.
    """

    ce: float = Field(default=0.1, ge=0)
    """Weight of the cross-entropy."""
    tv: float = Field(default=0.9, ge=0)
    """Weight of the total variation to the target's distribution."""
    confidence: float = Field(default=1.0, ge=0)
    """Weight of the confidence head's loss."""
    decay: PositiveFloat | None = 4.0
    """Slot j weighs exp(-j / decay); null weighs all alike."""


class TrainConfig(Section):
    """How the draft is trained."""

    strategy: Literal["ddp", "deepspeed"] = "ddp"
    """What a rank keeps: all of the optimizer (`ddp`), or its part (`deepspeed`, see
    `resources.memory.zero_stage`). The only field here that is in no fingerprint: but for rounding
    the draft is the same, and either continues from the other's checkpoints.
    """
    start_from: str | None = None
    """Folder of a draft whose weights training starts from, instead of fresh ones: of this project,
    or a released DFlash draft. Its layers, heads and captured layers must be the run's.
    """
    seed: int = 42
    """Seed of weights, order and anchors."""
    epochs: PositiveInt = 10
    """Passes over the training samples."""
    max_steps: int | None = Field(default=None, ge=0)
    """Stop after this many optimizer steps, however many epochs are left. 0 takes the draft of
    `start_from` as it is, to be evaluated and exported.
    """
    window_shards: PositiveInt = 64
    """Shards whose samples are shuffled together; the order of the shards is shuffled too.
    Reads stay within a window.
    """
    window_epochs: PositiveInt = 1
    """Passes over the samples of a window, each in another order, before the next window; a
    divisor of `epochs`.
    """
    global_batch: PositiveInt = 512
    """Samples per optimizer step, over all ranks and micro-batches."""
    lr: PositiveFloat = 6e-4
    """Peak learning rate (AdamW, cosine)."""
    warmup: float = Field(default=0.04, ge=0, lt=1)
    """Share of the steps that warm up."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's weight decay."""
    clip: PositiveFloat = 1.0
    """Norm that the gradient is clipped to."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the forward pass; master weights are float32."""
    checkpoint_steps: PositiveInt = 500
    """Optimizer steps between two checkpoints that are measured;
    `resources.training.checkpoint_minutes` adds others.
    """
    acceptance_samples: int = Field(default=64, ge=0)
    """Held-out samples on which the draft's acceptance is measured at every checkpoint, so that
    the best one is kept; 0 keeps the last one.
    """
    patience: PositiveInt | None = None
    """Checkpoints in a row without a better acceptance after which training ends; null never
    ends it early.
    """

    @model_validator(mode="after")
    def _fresh_weights_are_trained(self) -> Self:
        if self.max_steps == 0 and self.start_from is None:
            raise ValueError("train.max_steps 0 needs train.start_from: a fresh draft is of no use")
        return self

    @model_validator(mode="after")
    def _epochs_are_whole_rounds(self) -> Self:
        if left := self.epochs % self.window_epochs:
            below = self.epochs - left
            above = f"{below + self.window_epochs} epochs"
            raise ValueError(
                f"train.epochs {self.epochs} is no multiple of train.window_epochs "
                f"{self.window_epochs}: choose {f'{below} or {above}' if below else above}"
            )
        return self
