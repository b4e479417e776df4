"""Peak memory of a run's stages on a GPU, by arithmetic: from the target's config and the run's
settings alone. No weight is read, and no GPU is needed. Tests compare it with the sizes of all
tensors of the passes themselves; what an allocator loses between tensors comes on top.

D hidden size, I that of the MLP, V vocabulary, m captured layers.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from deepspec.config.families import HeadGeometry, HFConfig, family_of, head_geometry, text_config
from deepspec.config.resources import MemoryConfig
from deepspec.config.run import RunConfig
from deepspec.model.chunked_loss import CHUNK_ELEMENTS
from deepspec.model.kv_cache import LayerCache
from deepspec.model.spec import DraftSpec
from deepspec.model.step_memory import StepMemory, StepSize

ITEM_BYTES = {"bfloat16": 2, "float32": 4}
PROMPT_TOKENS = 2000  # of a long prompt, which decoding is planned with
DRAWN_COPIES = 6  # float32 tensors of the logits that tokens are drawn from, at a time
CACHE_GROWTH = 1.5  # of the first write: the room that a cache then takes


class TargetLayer(NamedTuple):
    """Attention of one layer, which sees `window` tokens, or all where that is 0."""

    heads: HeadGeometry
    window: int


class TargetShape(NamedTuple):
    """What of a target decides its memory."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    is_tied: bool  # lm_head is the embedding
    layers: tuple[TargetLayer, ...]

    @classmethod
    def of(cls, config: HFConfig) -> "TargetShape":
        """The shape that a target's config.json describes.

        Raises:
            ConfigError: a family that is not known here.
        """
        family, text = family_of(config), text_config(config)
        whole = head_geometry(text, family)
        num_heads = text["num_attention_heads"]
        near = HeadGeometry(
            num_heads,
            text.get("num_key_value_heads") or num_heads,
            text.get("head_dim") or text["hidden_size"] // num_heads,
            values_are_keys=False,
        )
        kinds = text.get("layer_types") or ["full_attention"] * text["num_hidden_layers"]
        layers = tuple(
            TargetLayer(near, text["sliding_window"])
            if kind == "sliding_attention"
            else TargetLayer(whole, 0)
            for kind in kinds
        )
        return cls(
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            vocab_size=text["vocab_size"],
            # transformers ties them unless a config has it otherwise
            is_tied=bool(text.get("tie_word_embeddings", True)),
            layers=layers,
        )

    @property
    def num_parameters(self) -> int:
        """All but those of norms, which are few."""
        total = self.vocab_size * self.hidden_size * (1 if self.is_tied else 2)
        for (num_heads, num_kv_heads, head_dim, values_are_keys), _ in self.layers:
            widths = 2 * num_heads + (1 if values_are_keys else 2) * num_kv_heads
            total += self.hidden_size * (widths * head_dim + 3 * self.intermediate_size)
        return total

    def row_elements(self, capacity: int) -> int:
        """Numbers in the keys and values of a row of so many tokens."""
        return sum(
            2 * heads.num_kv_heads * heads.head_dim * LayerCache(1, capacity, window).most_slots
            for heads, window in self.layers
        )

    def pass_elements(self, num_captured: int) -> int:
        """Numbers that a forward pass holds for a token beside keys and values: the captured
        states, and a layer's.
        """
        return (num_captured + 6) * self.hidden_size + 3 * self.intermediate_size


@dataclass(frozen=True)
class StageMemory:
    """Peak bytes of each stage of a run on its GPU."""

    config: RunConfig
    target: HFConfig  # its config.json
    compiled: bool = True  # whether training compiles

    @cached_property
    def shape(self) -> TargetShape:
        """The target's."""
        return TargetShape.of(self.target)

    @cached_property
    def step(self) -> StepMemory:
        """A training step's.

        Raises:
            ConfigError: a target for which no draft is known.
        """
        target, compute = self.config.target, self.config.train.compute_dtype
        spec = DraftSpec.from_target(
            self.target,
            self.config.draft,
            layer_ids=target.layer_ids,
            mask_token_id=target.mask_token_id,
        )
        return StepMemory(
            spec,
            item=ITEM_BYTES[compute],
            # see `Drafter.hold_frozen`
            frozen_item=ITEM_BYTES[compute if target.dtype == compute else "float32"],
            compiled=self.compiled,
            recompute=self.config.resources.memory.recompute,
            chunk=CHUNK_ELEMENTS["cuda"],
        )

    def with_memory(self, **settings: int | bool) -> "StageMemory":
        """The same with other `resources.memory`."""
        return replace(self, config=self.config.with_resources(memory=settings))

    @property
    def memory(self) -> MemoryConfig:
        """`resources.memory`."""
        return self.config.resources.memory

    @property
    def step_size(self) -> StepSize:
        """The largest micro-batch of training."""
        return StepSize.of(self.config.draft, self.memory, self.config.hidden.max_length)

    def answers(self, rows: int) -> int:
        """Of answers in this process, so many rows at a time."""
        item = ITEM_BYTES[self.config.target.dtype]
        per_row = self._row(item, self.config.answers.max_new_tokens, num_drawn=1)
        return item * self.shape.num_parameters + rows * per_row

    def capture(self) -> int:
        """Of the target and a pass over a batch, or over one sample that is longer."""
        item = ITEM_BYTES[self.config.target.dtype]
        tokens = max(self.memory.batch_tokens, self.config.hidden.max_length)
        num_captured = len(self.config.target.layer_ids)
        return item * (self.shape.num_parameters + tokens * self.shape.pass_elements(num_captured))

    def evaluation(self, rows: int) -> int:
        """Of target and draft, which share embedding and lm_head, so many rows at a time."""
        settings, spec = self.config.evaluate, self.step.spec
        item = ITEM_BYTES[settings.dtype or self.config.target.dtype]
        num_drawn = spec.block_size + 1
        new_tokens = settings.max_new_tokens + num_drawn
        of_draft = 2 * spec.num_layers * spec.heads.num_kv_heads * spec.heads.head_dim
        per_row = self._row(item, new_tokens, num_drawn=num_drawn)
        per_row += item * of_draft * (PROMPT_TOKENS + new_tokens)
        weights = self.shape.num_parameters + self.step.num_trained
        return item * weights + rows * per_row

    def _row(self, item: int, new_tokens: int, *, num_drawn: int) -> int:
        """Of a row with `PROMPT_TOKENS`: as its prompt is read, or at the last of its tokens."""
        shape = self.shape
        reading = PROMPT_TOKENS * shape.pass_elements(len(self.config.target.layer_ids))
        reading += int(CACHE_GROWTH * shape.row_elements(PROMPT_TOKENS))
        drawing = num_drawn * shape.vocab_size * (item + DRAWN_COPIES * ITEM_BYTES["float32"])
        return max(item * reading, item * shape.row_elements(PROMPT_TOKENS + new_tokens) + drawing)

    def training(self, ranks: int = 1) -> int:
        """Of a rank of `ranks`, in its preflight or its largest micro-batch; with the target where
        that is on the same GPU.
        """
        resources = self.config.resources
        strategy = self.config.train.strategy
        held = self.step.held(ranks, self.memory if strategy == "deepspeed" else None)
        peak = max(self.step.preflight, held + self.step.micro_batch(self.step_size))
        source, own_gpus = resources.training.source, resources.training.rolling_gpus
        shares_gpu = source == "online" or (source == "rolling" and not own_gpus)
        return peak + (self.capture() if shares_gpu else 0)
