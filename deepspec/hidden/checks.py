"""What must be true of a shard's hidden states before its record is written (traps C2 and C3).

Every sample: finite, no empty rows. Every n-th: captured alone it is the same, and what the target
predicts comes back out of the stored states. T tokens, m captured layers, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.cache.format import HiddenSample
from deepspec.config.resources import ChecksConfig
from deepspec.errors import DamagedData
from deepspec.hidden.sequences import CaptureRow
from deepspec.target.model import Target, TargetOutput

MIN_POSITIONS = 256  # with fewer predictions a single one is more than the limit allows
# Of the target's own predictions, read back from exact states; rounding float32 ones to bfloat16
# turns more ties.
MIN_AGREEMENT = {torch.bfloat16: 0.995, torch.float32: 0.98}
# relative; other kernels for another batch shape give up to 0.01 in bfloat16, a mixed-up row about
# 1
MAX_ALONE_ERROR = 0.05
EXACT = ("raw", "lossless")


class StateChecks:
    """Collects what a shard's samples show; flags stay on the device, so that looking does not make
    the target wait.

    Predictions are counted on from shard to shard until there are enough of them to judge by.
    """

    def __init__(self, target: Target, settings: ChecksConfig) -> None:
        self.target, self.every, self.limits = target, settings.recapture_every, settings.fidelity
        self._num_rows, self._ids, self._flags = 0, list[int](), list[Tensor]()
        self._positions = self._agreeing = 0
        self._min_agreement = 0.0

    def begin(self, num_rows: int) -> None:
        """A shard of so many samples comes next, shortest first."""
        self._num_rows, self._ids, self._flags = num_rows, [], []

    def look(self, row: CaptureRow, states: TargetOutput, sample: HiddenSample) -> None:
        """Take note of one sample: `states` as captured ([T, m * D] and [T, D]), `sample` as it
        will be stored.

        Raises:
            DamagedData: captured alone, or read back, it is not the same.
        """
        finite = torch.isfinite(states.context).all() & torch.isfinite(states.last_hidden).all()
        empty = (states.context == 0).all(dim=-1).any()
        # the last and longest of a shard in any case
        if (self._num_rows - 1 - len(self._ids)) % self.every == 0:
            self._compare_alone(row, states)
            self._compare_stored(row, states, sample)
        self._ids.append(row.sample_id)
        self._flags.append(torch.stack([~finite, empty]))

    def settle(self) -> None:
        """Raise DamagedData if anything was wrong with any sample of the shard, naming the
        first.
        """
        for sample_id, (not_finite, empty) in zip(
            self._ids, torch.stack(self._flags).tolist() if self._flags else [], strict=True
        ):
            if not_finite:
                raise DamagedData(
                    "the target's hidden states are not finite",
                    where=_name(sample_id),
                    fix="check its weights and target.dtype",
                )
            if empty:
                raise DamagedData(
                    "a token has no hidden state (all zeros)",
                    where=_name(sample_id),
                    fix="check the model's weights",
                )
        if self._positions >= MIN_POSITIONS:
            positions, agreement = self._positions, self._agreeing / self._positions
            self._positions = self._agreeing = 0
            if agreement < self._min_agreement:
                what = f"only {agreement:.1%} of the target's predictions come back out of the stored states"
                fix = "the final norm is missing or applied twice, or the codec is too coarse; report this with the model's name"
                raise DamagedData(
                    what,
                    where=f"{positions} positions, the last in {_name(self._ids[-1])}",
                    fix=fix,
                )

    def _compare_alone(self, row: CaptureRow, states: TargetOutput) -> None:
        alone = self.target.forward(torch.tensor([row.input_ids], device=self.target.device))
        error = max(
            relative_difference(states.context, alone.context[0]),
            relative_difference(states.last_hidden, alone.last_hidden[0]),
        )
        if not error <= MAX_ALONE_ERROR:  # not a number is no better
            what = f"captured by itself, the sample's hidden states differ by {error:.1%} from those captured in a batch"
            raise DamagedData(
                what,
                where=_name(row.sample_id),
                fix="padding or packing leaks into the rows: report this with the model's name",
            )

    def _compare_stored(self, row: CaptureRow, states: TargetOutput, sample: HiddenSample) -> None:
        exact = sample.context.codec.name in EXACT
        limit = 0.01 if exact else self.limits.max_relative_error  # bfloat16 keeps 8 bits
        error = relative_difference(
            sample.context.decode(device=self.target.device), states.context
        )
        if not error <= limit:
            what = f"read back, the sample's context features differ by {error:.2%}, more than {limit:.2%}"
            raise DamagedData(what, where=_name(row.sample_id), fix="choose another hidden.codec")
        kept = kept_positions(sample.last_spans).to(self.target.device)
        if len(kept):
            own = states.last_hidden[kept]
            stored = sample.last_hidden.decode(device=self.target.device).to(own.dtype)
            self._positions += len(kept)
            self._agreeing += int(
                (
                    self.target.logits(stored).argmax(dim=-1)
                    == self.target.logits(own).argmax(dim=-1)
                ).sum()
            )
            exact_limit = MIN_AGREEMENT[self.target.dtype]
            self._min_agreement = (
                exact_limit
                if sample.last_hidden.codec.name in EXACT
                else self.limits.min_argmax_agreement
            )


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| over all entries."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def kept_positions(spans: Tensor) -> Tensor:
    """The positions [T'] that spans [n, 2] (start, length) cover."""
    ranges = [torch.arange(start, start + length) for start, length in spans.tolist()]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.long)


def _name(sample_id: int) -> str:
    return f"sample {sample_id:016x}"
