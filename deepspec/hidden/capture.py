"""Training sequences run through the target, and its states as they are stored or trained on.

T tokens, m captured layers, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from deepspec.cache.format import EncodedTensor, HiddenSample, Layout
from deepspec.config.data import HiddenConfig
from deepspec.errors import OutOfMemory
from deepspec.hidden.checks import kept_positions
from deepspec.hidden.expected_index import kept_spans
from deepspec.hidden.sequences import CaptureRow, token_batches
from deepspec.model.memory import Pieces, naming_oom
from deepspec.target.generate import pad_right
from deepspec.target.model import Target, TargetOutput


@dataclass(frozen=True)
class Capture:
    """The target, and the way in which its states are kept."""

    target: Target
    layout: Layout
    settings: HiddenConfig
    batch_tokens: int  # of a forward pass

    @cached_property
    def pieces(self) -> Pieces[CaptureRow, list[tuple[CaptureRow, TargetOutput]]]:
        """Batches run through the target, in halves where one runs out of memory."""
        too_large = partial(row_too_large, device=self.target.device, settings=self.settings)
        return Pieces(self._batch_states, size=_padded_tokens, too_large=too_large)

    def states(self, rows: Iterable[CaptureRow]) -> Iterator[tuple[CaptureRow, TargetOutput]]:
        """Each row with its own states, [T, m * D] and [T, D].

        Rows are packed where the attention kernel can, else computed in padded batches.
        """
        for batch in token_batches(rows, self.batch_tokens):
            for captured in self.pieces(batch):
                yield from captured

    def _batch_states(self, batch: Sequence[CaptureRow]) -> list[tuple[CaptureRow, TargetOutput]]:
        sequences = [row.input_ids for row in batch]
        if self.target.packs:
            return list(zip(batch, self.target.forward_packed(sequences), strict=True))
        output = self.target.forward(pad_right(sequences, self.target.device))
        return [
            (row, TargetOutput(*(states[: len(row.input_ids)] for states in padded)))
            for row, *padded in zip(batch, *output, strict=True)
        ]

    def fitting(self, row: CaptureRow) -> AbstractContextManager[None]:
        """Turn an allocation that failed within the block, for this row, into its error."""
        return naming_oom(row_too_large(row, device=self.target.device, settings=self.settings))

    def sample(self, row: CaptureRow, states: TargetOutput) -> HiddenSample:
        """The row as it is stored, quantized on the target's device.

        A GPU then sends half the bytes to the host.
        """
        spans = torch.from_numpy(kept_spans(row, self.settings))
        context, last_hidden = self.layout.context, self.layout.last_hidden
        kept = states.last_hidden[kept_positions(spans).to(states.last_hidden.device)]
        return HiddenSample(
            sample_id=row.sample_id,
            input_ids=torch.tensor(row.input_ids, dtype=torch.int32),
            loss_mask=torch.tensor(row.loss_mask, dtype=torch.uint8),
            context=EncodedTensor(context, context.quantize(states.context)),
            last_hidden=EncodedTensor(last_hidden, last_hidden.quantize(kept)),
            last_spans=spans,
        )


def row_too_large(row: CaptureRow, *, device: torch.device, settings: HiddenConfig) -> OutOfMemory:
    """The error of a sequence that there is no memory for, with the length to lower."""
    return OutOfMemory(
        f"the hidden states of a sequence of {len(row.input_ids)} tokens do not fit into the"
        f" memory of {device} next to the target",
        where=f"sample {row.sample_id:016x}",
        fix=f"lower hidden.max_length (now {settings.max_length}), which cuts longer"
        " sequences, or capture on a device with more memory",
    )


def _padded_tokens(batch: Sequence[CaptureRow]) -> int:
    return len(batch) * max(len(row.input_ids) for row in batch)
