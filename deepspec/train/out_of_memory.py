"""What to change when a training step does not fit into memory."""

import contextlib
from collections.abc import Iterator

from deepspec.config.draft import DraftConfig
from deepspec.config.resources import MemoryConfig
from deepspec.errors import TrainingFailed

# in errors of CUDA and its libraries, and of PyTorch's allocator on the CPU
PHRASES = ("out of memory", "can't allocate memory")
# fields of a draft, each a factor of a step's activations
DRAFT_FACTORS = ("num_anchors", "block_size", "ttt_length")


@contextlib.contextmanager
def explain_oom(draft: DraftConfig, memory: MemoryConfig) -> Iterator[None]:
    """Turn an allocation that failed within the block into an error that names what to lower.

    Raises:
        TrainingFailed: out of memory, on the GPU or the CPU.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not any(phrase in str(error).lower() for phrase in PHRASES):
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
