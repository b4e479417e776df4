"""What is done where memory is short in training: a micro-batch in halves, or an error."""

from contextlib import AbstractContextManager

from deepspec.config.run import RunConfig
from deepspec.errors import OutOfMemory
from deepspec.model.drafter import TrainBatch
from deepspec.model.memory import naming_oom

# fields of a draft, each a factor of a step's activations
DRAFT_FACTORS = ("num_anchors", "block_size", "ttt_length")


def halves(batch: TrainBatch) -> tuple[TrainBatch, TrainBatch]:
    """The samples of a micro-batch of several in two, which share its memory; fill stays last."""
    middle = len(batch.seeds) // 2
    end = int(batch.lengths[:middle].sum())
    return (
        _part(batch, tokens=slice(end), samples=slice(middle)),
        _part(batch, tokens=slice(end, None), samples=slice(middle, None)),
    )


def _part(batch: TrainBatch, *, tokens: slice, samples: slice) -> TrainBatch:
    return TrainBatch(
        input_ids=batch.input_ids[tokens],
        loss_mask=batch.loss_mask[tokens],
        lengths=batch.lengths[samples],
        context=batch.context[tokens],
        last_hidden=batch.last_hidden[tokens],
        seeds=batch.seeds[samples],
    )


def explain_oom(config: RunConfig) -> AbstractContextManager[None]:
    """Turn an allocation that failed within the block into an error that names what to change.

    Raises:
        OutOfMemory: on the GPU or the CPU.
    """
    memory, fields = config.resources.memory, config.draft.model_dump()
    factors = [f"draft.{name} (now {fields[name]})" for name in DRAFT_FACTORS if name in fields]
    sharding = "train.strategy deepspeed on several GPUs keeps a part of the optimizer on each"
    if config.train.strategy == "deepspeed":
        sharding = (
            f"a higher resources.memory.zero_stage (now {memory.zero_stage}) or "
            f"resources.memory.offload (now {memory.offload}) leave more to it; train.strategy "
            "ddp does a micro-batch again in halves, which ranks that meet within one cannot"
        )
    error = OutOfMemory(
        "a training step does not fit into memory",
        fix=f"lower resources.memory.batch_tokens (now {memory.batch_tokens}) or "
        f"resources.memory.batch_slots (now {memory.most_slots}), or set "
        f"resources.memory.recompute (now {memory.recompute}), which change no result; "
        f"{sharding}; then {' or '.join(factors)}",
    )
    return naming_oom(error)
