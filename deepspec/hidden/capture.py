"""Training sequences run through the target, and its states as they are stored or trained on.

T tokens, m captured layers, D hidden size.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from deepspec.cache.format import EncodedTensor, HiddenSample, Layout
from deepspec.config.data import HiddenConfig
from deepspec.hidden.checks import kept_positions
from deepspec.hidden.expected_index import kept_spans
from deepspec.hidden.sequences import CaptureRow, token_batches
from deepspec.target.generate import pad_right
from deepspec.target.model import Target, TargetOutput


class Capture(NamedTuple):
    """The target, and the way in which its states are kept."""

    target: Target
    layout: Layout
    settings: HiddenConfig
    batch_tokens: int  # of a forward pass

    def states(self, rows: Iterable[CaptureRow]) -> Iterator[tuple[CaptureRow, TargetOutput]]:
        """Each row with its own states, [T, m * D] and [T, D].

        Rows are packed where the attention kernel can, else computed in padded batches.
        """
        for batch in token_batches(rows, self.batch_tokens):
            sequences = [row.input_ids for row in batch]
            if self.target.packs:
                yield from zip(batch, self.target.forward_packed(sequences), strict=True)
                continue
            output = self.target.forward(pad_right(sequences, self.target.device))
            for row, context, last_hidden in zip(batch, *output, strict=True):
                length = len(row.input_ids)
                yield row, TargetOutput(context[:length], last_hidden[:length])

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
