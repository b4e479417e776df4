"""The sections of a run about its data: prompts, answers, hidden states."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from deepspec.config.benchmarks import check_name
from deepspec.config.section import Section


class DemoSource(Section):
    """Prompts of the embedded demo."""

    kind: Literal["demo"]
    """The prompts of the demo stage."""


class FileSource(Section):
    """Prompts in files."""

    kind: Literal["files"]
    """JSONL or Parquet files."""
    paths: tuple[str, ...] = Field(min_length=1)
    """Files (local paths or URLs); rows carry `messages`, `conversations`, `turns` or `prompt`."""
    column: str | None = None
    """Column that holds the conversation or the prompt; null takes the first of those four that
    exists.
    """


class DatasetSource(Section):
    """Prompts in a Hugging Face data set."""

    kind: Literal["dataset"]
    """A Hugging Face data set."""
    name: str
    """Name on the hub or a local folder."""
    subset: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split to read."""
    revision: str | None = None
    """Commit or tag to read; null reads the newest commit, logs a warning with it, and stays
    with it when it resumes.
    """
    column: str | None = None
    """Column that holds the conversation or the prompt; null takes the first of `messages`,
    `conversations`, `turns` and `prompt` that exists.
    """


PromptSource = Annotated[DemoSource | FileSource | DatasetSource, Field(discriminator="kind")]


class PromptsConfig(Section):
    """Where prompts come from, which of them are kept, and how they are cut into shards."""

    source: PromptSource
    """Where prompts come from."""
    limit: PositiveInt | None = None
    """Prompts to keep at most, in source order; null keeps all."""
    shard_rows: PositiveInt = 128
    """Prompts per shard; the shard numbers of all later stages follow from it."""
    held_out: float = Field(default=0.05, ge=0, lt=1)
    """Share of the prompts that training never sees."""
    seed: int = 42
    """Seed of the held-out split."""
    decontaminate: tuple[Annotated[str, AfterValidator(check_name)], ...] = ()
    """Benchmarks, known ones by name or files (`turns` on each line): prompts that are one of
    theirs are dropped.
    """
    duplicates: Literal["drop", "keep"] = "drop"
    """What to do with a repeated conversation; one that is kept has an id of its own, and the
    split of the first.
    """
    max_rejected: float = Field(default=0.05, ge=0, le=1)
    """Share of unusable rows above which the stage fails."""


class SamplingConfig(Section):
    """How a next token is drawn."""

    temperature: float = Field(default=0.7, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Smallest set of tokens with this probability mass is kept."""
    top_k: int = Field(default=0, ge=0)
    """Tokens kept; 0 keeps all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Tokens below this share of the likeliest one are dropped."""


class AnswerSamplingConfig(SamplingConfig):
    """How the target draws the tokens of its answers."""

    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the logits of tokens that came before; 1 leaves them. Only servers compute it."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from the logits of tokens that came before; 0 leaves them. Only servers compute it."""


class AnswersConfig(Section):
    """How the target answers the prompts."""

    engine: str = Field(
        default="transformers", pattern=r"^(transformers|openai|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$"
    )
    """`transformers` (in process), `openai` (servers at `resources.servers.endpoints`), or
    `package.module:Class` of an engine of your own.
    """
    sampling: AnswerSamplingConfig = AnswerSamplingConfig()
    """How the target draws its answers."""
    max_new_tokens: PositiveInt = 4096
    """Tokens per answer at most."""
    truncated: Literal["keep", "drop", "retry"] = "keep"
    """What to do with an answer that reaches the limit; `retry` requests it once more with a
    larger one, and keeps the result.
    """
    retry_max_new_tokens: PositiveInt | None = None
    """The larger limit of `truncated: retry`; null is four times `max_new_tokens`."""
    seed: int = 42
    """Seed of the answers; each prompt draws from its own stream."""

    @model_validator(mode="after")
    def _retry_has_more_room(self) -> Self:
        if self.retry_max_new_tokens is not None and (
            self.truncated != "retry" or self.retry_max_new_tokens <= self.max_new_tokens
        ):
            raise ValueError(
                "answers.retry_max_new_tokens goes with answers.truncated `retry`, and is more "
                "than answers.max_new_tokens"
            )
        return self


class HiddenConfig(Section):
    """Which of the target's hidden states are kept, and how they are stored."""

    codec: Literal["raw", "lossless", "int8", "fp8"] = "raw"
    """How context features are stored: `raw` is plain bfloat16, `lossless` the same
    entropy-coded, `int8` and `fp8` are 8 bits with scales (half the size).
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
    """Whether the final hidden states around supervised tokens are kept, or none at all (DFlash
    does not need them).
    """

    @model_validator(mode="after")
    def _compression_has_codes(self) -> Self:
        if self.compression == "zstd" and self.codec not in ("int8", "fp8"):
            raise ValueError(
                "hidden.compression `zstd` goes with hidden.codec int8 or fp8; `lossless` is "
                "entropy-coded already"
            )
        return self

    @property
    def codec_of_last_hidden(self) -> Literal["raw", "lossless", "int8"]:
        """The codec of the final hidden states, whether it is given or follows `codec`."""
        return self.last_codec or ("int8" if self.codec == "fp8" else self.codec)
