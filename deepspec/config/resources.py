"""The section `resources` of a run: how the work is done. None of it changes a result, so none of
it is in a fingerprint.
"""

from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from deepspec.config.old_keys import REMOVED, moved_keys
from deepspec.config.retries import RetriesConfig
from deepspec.config.section import Section
from deepspec.config.servers import ServersConfig

# long answers at 512 anchors a sample and blocks of 7 have 3.8; short ones up to 7
SLOTS_PER_TOKEN = 4


class DevicesConfig(Section):
    """What computes: devices, lanes and threads of a machine."""

    type: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` takes the GPU if there is one."""
    lanes: PositiveInt | None = None
    """Groups of shards under way at a time; null is one per visible GPU (worker, GPU of the
    cluster), or one.
    """
    gpus_per_lane: PositiveInt = 1
    """GPUs that a lane's target is spread over, layer by layer, in answers, capture and
    evaluation; for targets too large for one. Ranks of training have one GPU each, and an online
    training's target, too.
    """
    cuda_graphs: Literal["auto", "off"] = "auto"
    """Whether decoding in process replays CUDA graphs, on a GPU that has all of the target."""
    encode_threads: PositiveInt = 2
    """Threads that encode captured samples; lossless takes a second of one for half a gigabyte."""
    read_threads: PositiveInt = 4
    """Threads that read ahead; raise it for S3 over a long line."""
    evaluate_threads: PositiveInt | None = None
    """CPU threads of the evaluation; null leaves it to PyTorch. One is best for a tiny model."""
    speed_curve: str | None = None
    """JSON file with the target's steps per second by tokens in a step, for the prefix
    scheduler; null measures this machine.
    """


class RunnerConfig(Section):
    """Where flows do a stage's work, and in what portions."""

    kind: Literal["local", "workers", "ray"] = "local"
    """In children on the flow's own machine, as runs on the workers of a pool, or on a Ray
    cluster.
    """
    ray_address: str | None = None
    """Ray cluster of the runner `ray`, e.g. 10.0.0.1:6379; null is RAY_ADDRESS, or a Ray
    started for the flow on its own machine.
    """
    workers: str = "gpu"
    """Name of the deployments (`regenerate/gpu`, ...) whose pool's workers do the work where
    the kind is `workers`.
    """
    shards_per_task: PositiveInt = 32
    """Shards dealt to a lane at a time at most."""
    group_minutes: PositiveFloat = 20.0
    """Minutes that a group of shards should last: the number of shards dealt to a lane follows
    from its pace so far.
    """
    stop_s: float | None = Field(default=None, ge=0)
    """Seconds beyond the usual five that a stage has to end after a request to stop: training
    finishes its step and saves it. Null is eight, in training as many as its steps and
    checkpoints so far need. A worker ends a cancelled run's flow after 30 whatever this is; the
    stage still has its time.
    """

    @property
    def patience_s(self) -> float:
        """`stop_s`, or what it is where none is set and nothing was measured."""
        return 8.0 if self.stop_s is None else self.stop_s


class StorageConfig(Section):
    """Local disks, and what is kept on them."""

    scratch: str | None = None
    """Local folder on a fast disk for uploads on their way and fetched copies; null is
    ~/.cache/deepspec.
    """
    min_free_gb: float = Field(default=1.0, ge=0)
    """Free disk space (GB) below which a stage refuses to start, and a working one pauses until
    there is more.
    """
    space_poll_s: PositiveFloat = 10.0
    """Seconds between two looks at the free space while a stage is paused."""
    copies_gb: float = Field(default=0.0, ge=0)
    """Local copies (GB) of samples read from a remote store, under `scratch`; the least
    recently used shards go first.
    """


class MemoryConfig(Section):
    """What memory is spent on, on the GPU and on the host."""

    batch_tokens: PositiveInt = 8192
    """Tokens per forward pass in capture and per micro-batch in training, where samples are
    packed one after the other.
    """
    batch_slots: PositiveInt | None = None
    """Predicted tokens per micro-batch in training at most, which memory goes by as well: a
    sample has min(`draft.num_anchors`, its supervised tokens) x `draft.block_size` (one more in
    the layout `anchor_is_context`), in eagle3 its supervised tokens x `draft.ttt_length`. Null is
    four for each of `batch_tokens`.
    """
    answer_rows: PositiveInt = 64
    """Prompts decoded together by the in-process engine at most; fewer where the free memory (on a
    CPU the container's, where that has less) has no room for their keys and values.
    """
    recompute: bool = False
    """Whether a training step computes each layer once more in its backward pass: less memory
    for about a third more time.
    """
    zero_stage: Literal[1, 2, 3] = 2
    """What `train.strategy: deepspeed` deals out to the ranks: the optimizer's state (1),
    gradients too (2), parameters too (3).
    """
    offload: Literal["none", "optimizer", "all"] = "none"
    """What it keeps in the host's memory: the optimizer, which then also steps there, or (stage
    3 only) the parameters too.
    """
    write_buffer_mb: PositiveInt = 512
    """Hidden states (MB) that may wait to be written; the target waits when there are more."""
    prefetch_mb: PositiveInt = 512
    """Stored samples (MB) read ahead of training."""

    @property
    def most_slots(self) -> int:
        """`batch_slots`, or what it is where none is set."""
        return self.batch_slots or SLOTS_PER_TOKEN * self.batch_tokens

    @model_validator(mode="after")
    def _only_partitioned_parameters_are_offloaded(self) -> Self:
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                "resources.memory.offload `all` needs resources.memory.zero_stage 3: the other "
                "stages keep the parameters on every rank"
            )
        return self


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


class ChecksConfig(Section):
    """What is checked while work is done, and how strictly."""

    space: Literal["refuse", "warn"] = "refuse"
    """What to do when the hidden states will not fit into the store (`hidden --force` is
    `warn`).
    """
    gpu_memory: Literal["refuse", "warn"] = "refuse"
    """What to do where a stage will not fit the GPU's memory, by arithmetic (`plan` shows it)."""
    preflight: Literal["refuse", "warn"] = "refuse"
    """What to do where masks, features or one sample's loss, examined before the first step,
    are wrong.
    """
    recapture_every: PositiveInt = 64
    """Every n-th sample is captured a second time by itself and compared, before its shard is
    committed.
    """
    uploads: Literal["read_back", "size_only"] = "read_back"
    """How an upload is checked: read back whole and hashed, or its length alone (where reading
    costs money).
    """
    reads: Literal["first", "always"] = "first"
    """When a stored sample is compared with its checksum: the first time that a process reads
    it, or every time.
    """
    fidelity: FidelityConfig = FidelityConfig()


class TrainingConfig(Section):
    """How a training is laid out on the machine, and where its hidden states come from."""

    ranks: PositiveInt | None = None
    """Processes that train together; null is one per visible GPU, or one."""
    checkpoint_minutes: PositiveFloat | None = 30.0
    """Minutes between two checkpoints at most, whatever `train.checkpoint_steps` is; those that
    it adds are not measured, so that no result depends on the machine's speed. Null adds none.
    """
    compile: bool | Literal["auto"] = "auto"
    """Whether training compiles what a draft computes position by position and the terms of its
    loss; `auto` does on a GPU where that works. Attention on a GPU is compiled in any case.
    """
    source: Literal["cache", "rolling", "online"] = "cache"
    """Where hidden states are read: from the sealed cache; from shards captured shortly before
    they are needed and deleted afterwards; or from the target itself.
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


class ResourcesConfig(Section):
    """How the work is done: no field here changes a result."""

    devices: DevicesConfig = DevicesConfig()
    runner: RunnerConfig = RunnerConfig()
    servers: ServersConfig = ServersConfig()
    retries: RetriesConfig = RetriesConfig()
    storage: StorageConfig = StorageConfig()
    memory: MemoryConfig = MemoryConfig()
    checks: ChecksConfig = ChecksConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="before")
    @classmethod
    def _keys_are_those_of_this_version(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        moved = moved_keys(fields, cls).items()
        wrong = [
            *(f"resources.{old} is now resources.{new}" for old, new in moved),
            *(
                f"resources.{old} no longer exists: {REMOVED[old]}"
                for old in REMOVED
                if old in fields
            ),
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return fields
