"""What is done where memory is short in training: a micro-batch in halves, or an error."""

import contextlib
from collections.abc import Iterator

from deepspec.config.draft import DraftConfig
from deepspec.config.resources import MemoryConfig
from deepspec.errors import TrainingFailed
from deepspec.model.drafter import TrainBatch
from deepspec.model.memory import is_out_of_memory

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


@contextlib.contextmanager
def explain_oom(draft: DraftConfig, memory: MemoryConfig) -> Iterator[None]:
    """Turn an allocation that failed within the block into an error that names what to lower.

    Raises:
        TrainingFailed: out of memory, on the GPU or the CPU.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        fields = draft.model_dump()
        factors = [f"draft.{name} (now {fields[name]})" for name in DRAFT_FACTORS if name in fields]
        fix = (
            f"lower resources.memory.batch_tokens (now {memory.batch_tokens}) or "
            f"resources.memory.batch_slots (now {memory.most_slots}), or set "
            f"resources.memory.recompute (now {memory.recompute}), which change no result; "
            f"then {' or '.join(factors)}"
        )
        what = f"a training step does not fit into memory: {str(error).splitlines()[0]}"
        raise TrainingFailed(what, fix=fix) from error
