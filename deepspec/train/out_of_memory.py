"""What to turn when a training step does not fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from deepspec.config.run import RunConfig
from deepspec.errors import TrainingFailed

# by CUDA's libraries and by PyTorch's CPU allocator, in plain RuntimeErrors
SAID = ("out of memory", "can't allocate memory")
# of the draft: each is a factor of a step's activations
KNOBS = ("num_anchors", "block_size", "ttt_length")


@contextlib.contextmanager
def explain_oom(config: RunConfig) -> Iterator[None]:
    """Turns an allocation that failed within the block into one error that names what decides a
    step's size.

    Raises:
        TrainingFailed: out of memory, on the GPU or the CPU.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            words in str(error).lower() for words in SAID
        ):
            raise
        draft = config.draft.model_dump()
        knobs = [f"draft.{name} (now {draft[name]})" for name in KNOBS if name in draft]
        what = f"a training step does not fit into memory: {str(error).splitlines()[0]}"
        resources = config.resources
        free = f"resources.memory.batch_tokens (now {resources.memory.batch_tokens}) or set resources.memory.recompute (now {resources.memory.recompute})"
        fix = f"lower {free}, which change no result; then {' or '.join(knobs)}"
        raise TrainingFailed(what, where=f"run {config.name}", fix=fix) from error
