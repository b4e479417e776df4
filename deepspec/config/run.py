"""What a run is made of: one frozen pydantic model per stage, every field with a description and a
unit.

Everything under `resources` says how the work is done and stays out of every fingerprint; all other
fields decide what the result is. How recipes are found, merged and overridden is in `recipe.py`.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from deepspec.config.benchmarks import DEMO, Domain, check_name, short_name
from deepspec.config.data import (
    AnswerSamplingConfig,
    AnswersConfig,
    DatasetSource,
    DemoSource,
    FileSource,
    PromptsConfig,
    SamplingConfig,
)
from deepspec.config.draft import (
    BlockDraftConfig,
    ConfidenceConfig,
    DraftConfig,
    Eagle3DraftConfig,
    LossConfig,
    MarkovConfig,
    Section,
    TrainConfig,
)
from deepspec.config.resources import FidelityConfig, ResourcesConfig

__all__ = [
    "AnswerSamplingConfig",
    "AnswersConfig",
    "BenchmarkConfig",
    "BlockDraftConfig",
    "ConfidenceConfig",
    "DatasetSource",
    "DemoConfig",
    "DemoSource",
    "DraftConfig",
    "Eagle3DraftConfig",
    "EvaluateConfig",
    "FidelityConfig",
    "FileSource",
    "HiddenConfig",
    "LossConfig",
    "MarkovConfig",
    "PromptsConfig",
    "ResourcesConfig",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "TargetConfig",
    "TrainConfig",
]


class DemoConfig(Section):
    """The embedded default: a tiny target trained here on text that every Python installation
    carries.
    """

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
    model: str
    """Hugging Face name or local folder of the target model; `demo` is the target that the demo
    stage trains.
    """
    revision: str | None = None
    """Commit or tag of the model on the hub; null for a local folder."""
    chat_family: Literal["qwen", "gemma4"]
    """How the chat template marks turns."""
    thinking: bool = False
    """Whether the chat template switches thinking on."""
    layer_ids: tuple[int, ...] = Field(min_length=1)
    """Decoder layers (0-based) whose outputs are captured; -1 is the embedding output; never
    the last layer.
    """
    mask_token_id: int = Field(ge=0)
    """Token id that stands for a not yet drafted position."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format that the target computes in."""

    @model_validator(mode="after")
    def _layers_ascend(self) -> Self:
        if list(self.layer_ids) != sorted(set(self.layer_ids)) or self.layer_ids[0] < -1:
            raise ValueError("layer_ids must be ascending, without repeats, and at least -1")
        return self


class HiddenConfig(Section):
    codec: Literal["raw", "lossless", "int8", "fp8"] = "raw"
    """How context features are stored: bfloat16 as it is; the same entropy-coded; 8 bits with
    scales (half the size).
    """
    last_codec: Literal["raw", "lossless", "int8"] | None = None
    """How final hidden states are stored; null follows `codec` (int8 where that is fp8, which
    is too coarse for them).
    """
    compression: Literal["none", "zstd"] = "none"
    """Whether 8-bit codes are compressed as well: smaller, and slower to read."""
    max_length: PositiveInt = 4096
    """Tokens per sample at most; longer samples are cut."""
    last_hidden: Literal["supervised", "none"] = "supervised"
    """Keep the final hidden state around supervised tokens, or not at all (DFlash does not need
    it).
    """

    @model_validator(mode="after")
    def _compression_has_codes(self) -> Self:
        if self.compression == "zstd" and self.codec not in ("int8", "fp8"):
            raise ValueError(
                "hidden.compression `zstd` goes with hidden.codec int8 or fp8; `lossless` is entropy-coded already"
            )
        return self

    @property
    def codec_of_last_hidden(self) -> Literal["raw", "lossless", "int8"]:
        follows: Literal["raw", "lossless", "int8"] = "int8" if self.codec == "fp8" else self.codec
        return self.last_codec or follows


class BenchmarkConfig(Section):
    name: str
    """A known one (`gsm8k`; `gsm8k@COMMIT` pins its data set), `demo/math`, `demo/code`,
    `demo/chat`, or a JSONL or Parquet file.
    """
    limit: PositiveInt | None = None
    """Prompts to take, by a seeded shuffle; null takes the protocol's number of a known one,
    and all of a file.
    """
    turns: Literal["first", "all"] = "first"
    """User turns of each prompt to decode: the first, or all of them, each on the target's own
    answers to those before.
    """
    domain: Domain | None = None
    """What the prompts are about; null is a known one's own, and `other` for a file."""

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        return check_name(name, others=DEMO)


class EvaluateConfig(Section):
    benchmarks: tuple[BenchmarkConfig, ...] = Field(min_length=1)
    """Prompts to decode."""
    temperatures: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Field(
        default=(1.0,), min_length=1
    )
    """Each benchmark is decoded at each of these; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Smallest set of tokens with this probability mass is kept."""
    top_k: int = Field(default=0, ge=0)
    """Tokens kept; 0 keeps all."""
    batch_sizes: tuple[PositiveInt, ...] = Field(default=(1,), min_length=1)
    """Prompts decoded together; each benchmark is decoded at each of these, plainly and
    speculatively.
    """
    verify: Literal["full", "threshold", "scheduled"] = "full"
    """How much of a proposed block the target verifies: all, up to the first low confidence, or
    what the prefix scheduler admits.
    """
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Confidence below which `verify: threshold` cuts a block."""
    max_new_tokens: PositiveInt = 2048
    """Tokens per answer at most."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Number format of target and draft; null follows the target's."""
    seed: int = 0
    """Seed of the shuffle and of each prompt's random stream."""

    @field_validator("temperatures", "batch_sizes")
    @classmethod
    def _each_is_there_once(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError(
                "a value is there twice: its prompts would be decoded and counted twice"
            )
        return values

    @model_validator(mode="after")
    def _benchmarks_have_names_of_their_own(self) -> Self:
        names = Counter(short_name(benchmark.name) for benchmark in self.benchmarks)
        if twice := [name for name, count in names.items() if count > 1]:
            what = f"several benchmarks are called {', '.join(twice)}: their results could not be told apart"
            raise ValueError(f"{what}; name each once, rename a file, or leave one out")
        return self


class RunConfig(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the run: lower-case letters, digits, dot, dash, underscore."""
    store: str
    """Artifact store: a local folder or `s3://bucket/prefix`."""
    demo: DemoConfig | None = None
    """The embedded target and corpus; only where `target.model` is `demo`."""
    target: TargetConfig
    prompts: PromptsConfig
    answers: AnswersConfig = AnswersConfig()
    hidden: HiddenConfig = HiddenConfig()
    draft: DraftConfig
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig
    resources: ResourcesConfig = ResourcesConfig()

    @cached_property  # no field, and not compared: `load_run` knows it
    def typed(self) -> str:
        """The run as a command takes it, its overrides and store included; the word for it
        where nobody typed any.
        """
        return "RUN"

    @model_validator(mode="after")
    def _demo_is_whole(self) -> Self:
        if (self.target.model == "demo") != (self.demo is not None):
            raise ValueError("target.model `demo` and the section `demo` belong together")
        uses_demo = self.prompts.source.kind == "demo" or any(
            b.name.startswith("demo/") for b in self.evaluate.benchmarks
        )
        if uses_demo and self.demo is None:
            raise ValueError("demo prompts and demo benchmarks need the section `demo`")
        return self

    @model_validator(mode="after")
    def _engine_can_do_it(self) -> Self:
        sampling = self.answers.sampling
        if self.answers.engine == "openai" and bool(self.resources.servers.endpoints) == (
            self.resources.servers.start != "none"
        ):
            what = "answers.engine `openai` needs servers: either resources.servers.endpoints, e.g. [http://127.0.0.1:8000/v1], or resources.servers.start"
            raise ValueError(what)
        if sampling.presence_penalty and "transformers" in (
            self.resources.servers.start,
            self.resources.servers.dialect,
        ):
            raise ValueError(
                "answers.sampling.presence_penalty: `transformers serve` does not know it"
            )
        if self.answers.engine == "transformers" and (
            sampling.repetition_penalty,
            sampling.presence_penalty,
        ) != (1.0, 0.0):
            raise ValueError(
                "answers.sampling.repetition_penalty and presence_penalty need a server: answers.engine `openai`"
            )
        return self

    @model_validator(mode="after")
    def _patience_has_samples(self) -> Self:
        if self.train.patience is not None and self.prompts.held_out == 0:
            raise ValueError(
                "train.patience needs prompts.held_out: without held-out samples nothing tells which checkpoint is better"
            )
        return self

    @model_validator(mode="after")
    def _draft_finds_what_it_reads(self) -> Self:
        if self.hidden.last_hidden == "none" and (
            self.draft.algorithm == "eagle3" or self.loss.tv > 0 or self.draft.confidence
        ):
            raise ValueError("hidden.last_hidden `none` serves only a dflash draft with loss.tv 0")
        if self.draft.algorithm != "eagle3" and not self.loss.ce + self.loss.tv + (
            self.loss.confidence if self.draft.confidence else 0
        ):
            raise ValueError(
                "loss.ce, loss.tv and loss.confidence are all 0 for this draft: there is nothing to learn from"
            )
        if self.draft.algorithm == "eagle3" and self.target.layer_ids[0] < 0:
            raise ValueError("eagle3 cannot read layer -1, the embedding output")
        if self.evaluate.verify != "full" and not getattr(self.draft, "confidence", None):
            raise ValueError(
                "evaluate.verify: the draft tells no confidence to cut its blocks by; choose full, or draft.confidence"
            )
        return self
