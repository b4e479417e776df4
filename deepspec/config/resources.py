"""The section of a run that says how the work is done: none of it changes a result, so none of
it is in a fingerprint.
"""

from __future__ import annotations

import random
from typing import Annotated, Literal, NamedTuple, Self, cast
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from deepspec.config.draft import Section


class FidelityConfig(Section):
    """What a lossy codec of the hidden states must keep; measured on the first shards before
    any is written.
    """

    max_relative_error: PositiveFloat = 0.04
    """Of the context features, |decoded - original| / |original| over all tokens."""
    min_cosine: float = Field(default=0.995, ge=0, le=1)
    """Smallest cosine between a token's context features before and after."""
    max_total_variation: PositiveFloat = 0.02
    """Mean total variation between the target's next-token distributions before and after."""
    min_argmax_agreement: float = Field(default=0.97, ge=0, le=1)
    """Share of positions whose likeliest next token stays the same."""


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an endpoint is a URL such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "keys do not belong into an endpoint's URL: name the variable that holds one in resources.api_key_env"
        )
    return url.rstrip("/")


def _variable_name(name: str) -> str:
    if not name.isidentifier():  # what was given is not repeated: it may be the key
        raise ValueError(
            "this is the name of an environment variable, such as OPENAI_API_KEY; the key itself belongs into that variable"
        )
    return name


StageName = Literal["demo", "prompts", "answers", "hidden", "train", "evaluate"]
LONGEST_DELAY_S = 300.0
MOST_DOUBLINGS = 60  # of a delay: a power of two that is still a float, however often is tried
JITTER = 0.3  # share of a delay by which it varies, so that many do not come back at once

Endpoint = Annotated[str, AfterValidator(_endpoint)]
VariableName = Annotated[str, AfterValidator(_variable_name)]


class StageLimits(NamedTuple):
    """How often, and after what pause, a stage's work is tried again, and how long a child of
    it may take.
    """

    retries: int
    retry_delay_s: float
    deadline_s: float | None

    def delay_s(self, tries: int) -> float:
        """Seconds before the next try after so many: doubled each time, never the same for two
        that failed together.
        """
        doublings = min(max(tries - 1, 0), MOST_DOUBLINGS)
        return min(self.retry_delay_s * 2**doublings, LONGEST_DELAY_S) * random.uniform(
            1 - JITTER, 1 + JITTER
        )


class LimitsConfig(Section):
    """For one stage; what is left out is as for all."""

    retries: int | None = Field(default=None, ge=0)
    """Times that its work is tried again after a transient failure."""
    retry_delay_s: float | None = Field(default=None, ge=0)
    """Seconds before the first retry."""
    deadline_minutes: PositiveFloat | None = None
    """Minutes that one child process may take."""


class ResourcesConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` takes the GPU if there is one."""
    runner: Literal["local", "workers", "ray"] = "local"
    """Where flows do a stage's work: in children on their own machine, as runs on the workers
    of a pool, or on a Ray cluster.
    """
    ray_address: str | None = None
    """Ray cluster of the runner `ray`, e.g. 10.0.0.1:6379; null is RAY_ADDRESS, or a Ray
    started for the flow on its own machine.
    """
    workers: str = "gpu"
    """Name of the deployments (`regenerate/gpu`, ...) whose pool's workers do the work where
    the runner is `workers`.
    """
    lanes: PositiveInt | None = None
    """Groups of shards under way at a time; null is one per visible GPU (worker, GPU of the
    cluster), or one.
    """
    shards_per_task: PositiveInt = 32
    """Shards dealt to a lane at a time at most."""
    group_minutes: PositiveFloat = 20.0
    """Minutes that a group of shards should last: what a lane has managed so far decides how
    many it is dealt.
    """
    answer_rows: PositiveInt = 64
    """Prompts decoded together by the in-process engine."""
    endpoints: tuple[Endpoint, ...] = ()
    """OpenAI-compatible servers of the target (vLLM, SGLang, TGI, transformers serve, ...),
    each with its `/v1`.
    """
    dialect: Literal["auto", "openai", "vllm", "sglang", "transformers"] = "auto"
    """What those servers understand beyond OpenAI's schema; `auto` sees it in what vLLM and
    SGLang say of themselves.
    """
    serve: Literal["none", "vllm", "sglang", "transformers"] = "none"
    """Server of the target that the answers stage starts for itself on loopback, one per lane,
    instead of `endpoints`.
    """
    serve_command: tuple[str, ...] = ()
    """Its command, word by word, where the usual one will not do; {model}, {name}, {host},
    {port} and {dtype} are filled in.
    """
    serve_deadline_s: PositiveFloat = 900.0
    """Seconds until a server that was started must answer: loading a large target takes minutes."""
    served_model: str | None = None
    """Name under which the servers know the target; null is `target.model`."""
    api_key_env: VariableName = "OPENAI_API_KEY"
    """Environment variable that holds the servers' key; the key itself is written nowhere."""
    api_key_secret: str | None = None
    """Prefect Secret block that holds the key; flows put it into that variable of the children
    that ask servers, and nowhere else.
    """
    endpoint_requests: PositiveInt = 32
    """Requests in flight per server at most; fewer while it is overloaded."""
    request_timeout_s: PositiveFloat = 600.0
    """Seconds that one answer may take."""
    request_tries: PositiveInt = 6
    """Attempts per answer and run that a server was reached by, at any of them; one that is
    away or overloaded is not counted.
    """
    row_runs: PositiveInt = 3
    """Runs in which all attempts at a row may fail before it goes to the rejects."""
    max_refused: float = Field(default=0.2, ge=0, le=1)
    """Share of a shard's rows that servers may refuse or fail for good; above it the shard
    fails and is not committed.
    """
    lost_s: PositiveFloat = 120.0
    """Seconds without an answer, all servers failing, after which a shard fails, to be tried
    again later.
    """
    progress_s: PositiveFloat = 5.0
    """Seconds between two reports of how far the answers are."""
    token_ids: Literal["none", "ask"] = "none"
    """Whether servers are asked for the tokens they drew (`return_token_ids`, vLLM); others may
    refuse the field.
    """
    speed_curve: str | None = None
    """JSON file with the target's steps per second by tokens in a step, for the prefix
    scheduler; null measures this machine.
    """
    evaluate_threads: PositiveInt | None = None
    """CPU threads of the evaluation; null leaves it to PyTorch. A tiny model decodes no faster
    with a second one.
    """
    batch_tokens: PositiveInt = 8192
    """Tokens per forward pass in capture and per micro-batch in training, where samples are
    packed one behind the other.
    """
    compile: bool = False
    """Whether training compiles what a draft computes position by position; its attention on a
    GPU is compiled in any case.
    """
    recompute: bool = False
    """Whether a training step computes each layer once more in its backward pass: less memory
    for about a third more time.
    """
    retries: int = Field(default=3, ge=0)
    """Times that a shard, or a stage without shards, is tried again after a transient failure."""
    retry_delay_s: float = Field(default=2.0, ge=0)
    """Seconds before the first retry; doubled each time, up to five minutes, give or take a
    third.
    """
    deadline_minutes: PositiveFloat | None = None
    """Minutes that one child process (a group of shards, or a whole training) may take before
    it is ended and tried again.
    """
    stages: dict[StageName, LimitsConfig] = Field(default_factory=dict)
    """Other retries, delays and deadlines for single stages, e.g. `{train: {retries: 10}}`."""
    max_failed: float = Field(default=0.01, ge=0, le=1)
    """Share of a stage's shards that may fail for good (not: wait for another try); above it,
    and above ten, no more begin. 0: none may.
    """
    min_free_gb: float = Field(default=1.0, ge=0)
    """Free disk space (GB) below which a stage refuses to start, and a working one pauses until
    there is more.
    """
    space_poll_s: PositiveFloat = 10.0
    """Seconds between two looks at the free space while a stage is paused."""
    check_space: Literal["refuse", "warn"] = "refuse"
    """What to do when the hidden states will not fit into the store (`hidden --force` is
    `warn`).
    """
    scratch: str | None = None
    """Local folder on a fast disk for uploads on their way and fetched copies; null is
    ~/.cache/deepspec.
    """
    uploads: Literal["read_back", "size_only"] = "read_back"
    """How an upload is checked: read back whole and hashed, or its length alone (where reading
    costs money).
    """
    writes: Literal["direct", "buffered"] = "direct"
    """Whether shards are written past the page cache; `benchmarks/cache_write.py` tells which
    is faster on a disk.
    """
    write_buffer_mb: PositiveInt = 512
    """Hidden states (MB) that may wait to be written; the target waits when there are more."""
    encode_threads: PositiveInt = 2
    """Threads that encode captured samples; lossless takes a second of one for half a gigabyte."""
    check_every: PositiveInt = 64
    """Every n-th sample is captured a second time by itself and compared, before its shard is
    committed.
    """
    fidelity: FidelityConfig = FidelityConfig()
    train_ranks: PositiveInt | None = None
    """Processes that train together; null is one per visible GPU, or one."""
    zero_stage: Literal[1, 2, 3] = 2
    """What `train.strategy: deepspeed` deals out to the ranks: the optimizer's state (1),
    gradients too (2), parameters too (3).
    """
    offload: Literal["none", "optimizer", "all"] = "none"
    """What it keeps in the host's memory: the optimizer, which then also steps there, or (stage
    3 only) the parameters too.
    """
    stop_s: float = Field(default=8.0, ge=0)
    """Seconds beyond the usual five that a stage which is asked to stop has to end: training
    finishes its step and saves it. With eight everything is gone after 13; a worker ends a
    cancelled run's flow after 30, whatever is said here."""
    preflight: Literal["refuse", "warn"] = "refuse"
    """What to do where masks, features or one sample's loss, looked at before the first step,
    are wrong.
    """
    stall_minutes: PositiveFloat = 30.0
    """Minutes without a finished step or a captured shard after which training dumps its
    threads' stacks and ends, to be tried again.
    """
    source: Literal["cache", "rolling", "online"] = "cache"
    """Where training reads hidden states: the sealed cache; shards captured ahead of it and
    deleted behind it; or the target itself.
    """
    rolling_gb: PositiveFloat = 500.0
    """Hidden states (GB) that a rolling training has on the disk at most; two windows of shards
    must fit.
    """
    rolling_gpus: int = Field(default=1, ge=0)
    """GPUs, the last of the visible ones, on which a rolling training captures and does not
    train; 0 shares the first one.
    """
    render_processes: PositiveInt | None = None
    """Processes that render all answers once before a training without a cache; null is one per
    CPU core.
    """
    prefetch_mb: PositiveInt = 512
    """Stored samples (MB) read ahead of training."""
    read_threads: PositiveInt = 4
    """Threads that read ahead; raise it for S3 over a long line."""
    check_reads: Literal["first", "always"] = "first"
    """When a stored sample is compared with its checksum: the first time that a process reads
    it, or every time.
    """
    cache_gb: float = Field(default=0.0, ge=0)
    """Local copies (GB) of samples read from a remote store, under `scratch`; the least
    recently used shards go first.
    """

    def limits(self, stage: str) -> StageLimits:
        """What holds for a stage: its own settings before those of all."""
        own = self.stages.get(cast("StageName", stage), LimitsConfig())
        minutes = own.deadline_minutes or self.deadline_minutes
        retries = self.retries if own.retries is None else own.retries
        delay_s = self.retry_delay_s if own.retry_delay_s is None else own.retry_delay_s
        return StageLimits(retries, delay_s, None if minutes is None else 60 * minutes)

    @model_validator(mode="after")
    def _only_what_is_dealt_out_is_offloaded(self) -> Self:
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                "resources.offload `all` needs resources.zero_stage 3: the other stages keep the parameters on every rank"
            )
        return self
