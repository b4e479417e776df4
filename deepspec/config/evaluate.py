"""The section of a run about its evaluation: which prompts are decoded, and how."""

from collections import Counter
from functools import partial
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from deepspec.config.benchmarks import DEMO, Domain, check_name, short_name
from deepspec.config.section import Section


class BenchmarkConfig(Section):
    """A set of prompts to decode."""

    name: Annotated[str, AfterValidator(partial(check_name, others=DEMO))]
    """A known one (`gsm8k`; `gsm8k@COMMIT` pins its data set), `demo/math`, `demo/code`,
    `demo/chat`, or a JSONL or Parquet file.
    """
    limit: PositiveInt | None = None
    """Prompts to take, by a seeded shuffle; null takes the protocol's number of a known one,
    and all of a file.
    """
    turns: Literal["first", "all"] = "first"
    """User turns of each prompt to decode: the first, or all of them, each after the target's
    own answers to the earlier ones.
    """
    domain: Domain | None = None
    """What the prompts are about; null is a known one's own, and `other` for a file."""


class EvaluateConfig(Section):
    """What is decoded, with and without the draft, and how."""

    benchmarks: tuple[BenchmarkConfig, ...] = Field(min_length=1)
    """Sets of prompts to decode."""
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
    engine: Literal["in_process", "vllm", "openai"] = "in_process"
    """What decodes: target and draft in this process; a vLLM of each that the stage starts, one
    plain and one with the exported draft; or two such servers that run already
    (`resources.servers.plain_endpoint` and `draft_endpoint`).
    """
    concurrencies: tuple[PositiveInt, ...] = Field(default=(1, 8, 32), min_length=1)
    """Requests in flight at a server; each benchmark is served at each of these, where `engine` is
    not `in_process`, instead of at `batch_sizes`.
    """
    draft_sampling: Literal["greedy", "probabilistic"] | None = None
    """How a served draft chooses its tokens: the likeliest ones, or drawn as the target draws
    (vLLM's `draft_sample_method`); null draws where a temperature is above 0.
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

    @property
    def is_served(self) -> bool:
        """Whether servers decode."""
        return self.engine != "in_process"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Prompts decoded together, or requests in flight."""
        return self.concurrencies if self.is_served else self.batch_sizes

    @property
    def sampling_of_draft(self) -> Literal["greedy", "probabilistic"]:
        """`draft_sampling`, or what it is where none is set."""
        return self.draft_sampling or ("probabilistic" if max(self.temperatures) else "greedy")

    @field_validator("temperatures", "batch_sizes", "concurrencies")
    @classmethod
    def _no_value_is_repeated(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(values)) < len(values):
            raise ValueError("a value is repeated: its prompts would be decoded and counted twice")
        return values

    @model_validator(mode="after")
    def _servers_verify_whole_blocks(self) -> Self:
        if self.is_served and self.verify != "full":
            raise ValueError(
                f"evaluate.verify `{self.verify}` cuts blocks in process only; with evaluate.engine"
                f" `{self.engine}` choose full"
            )
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        names = Counter(short_name(benchmark.name) for benchmark in self.benchmarks)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(
                f"several benchmarks are called {', '.join(twice)}: their results could not be "
                "distinguished; name each once, rename a file, or leave one out"
            )
        return self
