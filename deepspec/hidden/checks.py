"""What must be true of a shard's hidden states before its record is written (traps C2 and C3).

Every sample: finite, no empty rows. Every n-th: captured alone it is the same, and what the target
predicts is also predicted from the stored states. T tokens, m captured layers, D hidden size.
"""

import torch
from torch import Tensor

from deepspec.cache.codecs import LOSSY
from deepspec.cache.format import HiddenSample
from deepspec.config.resources import ChecksConfig
from deepspec.errors import DamagedData
from deepspec.hidden.sequences import CaptureRow
from deepspec.target.model import Target, TargetOutput

MIN_POSITIONS = 256  # with fewer predictions a single one is more than the limit allows
# Of the target's own predictions, from exact states; rounding float32 ones to bfloat16 turns more
# ties.
MIN_AGREEMENT = {torch.bfloat16: 0.995, torch.float32: 0.98}
# Relative; another batch shape's kernels give up to 0.01 in bfloat16, a mixed-up row about 1.
MAX_ALONE_ERROR = 0.05
MAX_EXACT_ERROR = 0.01  # relative; bfloat16 keeps 8 bits
LOGIT_TOKENS = 512  # whose logits are there at a time
NOT_FINITE = "the target's hidden states are not finite"
EMPTY = "a token has no hidden state (all zeros)"


class StateChecks:
    """Collects findings on a shard's samples.

    Findings on every sample stay on the device, so that the target need not wait for them.
    Predictions are counted from shard to shard until there are enough of them to judge by.
    """

    def __init__(self, target: Target, settings: ChecksConfig) -> None:
        self.target = target
        self.every = settings.recapture_every
        self.limits = settings.fidelity
        self._positions = self._agreeing = 0
        self._min_agreement = 0.0

    def begin(self, num_rows: int) -> None:
        """Start a shard of so many samples, which come shortest first."""
        self._num_rows = num_rows
        self._ids = list[int]()
        self._flags = list[Tensor]()

    def add(self, row: CaptureRow, states: TargetOutput, sample: HiddenSample) -> None:
        """Check one sample.

        Args:
            row: Its tokens.
            states: As captured, [T, m * D] and [T, D].
            sample: As it will be stored.

        Raises:
            DamagedData: captured alone, or read back, it is not the same.
        """
        finite = torch.isfinite(states.context).all() & torch.isfinite(states.last_hidden).all()
        empty = (states.context == 0).all(dim=-1).any()
        # Counted from the end: the last and longest of a shard is compared in any case.
        if (self._num_rows - 1 - len(self._ids)) % self.every == 0:
            self._compare_alone(row, states)
            self._compare_stored(row, states, sample)
        self._ids.append(row.sample_id)
        self._flags.append(torch.stack([~finite, empty]))

    def finish(self) -> None:
        """Judge the shard.

        Raises:
            DamagedData: something was wrong with a sample of it, the first of which is named.
        """
        flags = torch.stack(self._flags).tolist() if self._flags else []
        for sample_id, (is_not_finite, is_empty) in zip(self._ids, flags, strict=True):
            if is_not_finite or is_empty:
                raise DamagedData(
                    NOT_FINITE if is_not_finite else EMPTY,
                    where=_name(sample_id),
                    fix="check the model's weights and target.dtype",
                )
        if self._positions < MIN_POSITIONS:
            return
        positions, agreement = self._positions, self._agreeing / self._positions
        self._positions = self._agreeing = 0
        if agreement < self._min_agreement:
            raise DamagedData(
                f"only {agreement:.1%} of the target's predictions come back out of the stored "
                "states",
                where=f"{positions} positions, the last in {_name(self._ids[-1])}",
                fix="the final norm is missing or applied twice, or the codec is too coarse; "
                "report this with the model's name",
            )

    def _compare_alone(self, row: CaptureRow, states: TargetOutput) -> None:
        alone = self.target.forward(torch.tensor([row.input_ids], device=self.target.device))
        error = max(
            relative_difference(states.context, alone.context[0]),
            relative_difference(states.last_hidden, alone.last_hidden[0]),
        )
        if not error <= MAX_ALONE_ERROR:  # not a number is no better
            raise DamagedData(
                f"captured by itself, the sample's hidden states differ by {error:.1%} from those "
                "captured in a batch",
                where=_name(row.sample_id),
                fix="padding or packing leaks into the rows: report this with the model's name",
            )

    def _compare_stored(self, row: CaptureRow, states: TargetOutput, sample: HiddenSample) -> None:
        device = self.target.device
        exact = sample.context.codec.name not in LOSSY
        limit = MAX_EXACT_ERROR if exact else self.limits.max_relative_error
        error = relative_difference(sample.context.decode(device=device), states.context)
        if not error <= limit:
            raise DamagedData(
                f"read back, the sample's context features differ by {error:.2%}, more than "
                f"{limit:.2%}",
                where=_name(row.sample_id),
                fix="choose another hidden.codec",
            )
        kept = kept_positions(sample.last_spans).to(device)
        own = states.last_hidden[kept]
        stored = sample.last_hidden.decode(device=device).to(own.dtype)
        agreeing = torch.zeros((), dtype=torch.long, device=device)
        # Logits of a whole answer are gigabytes.
        for parts in zip(stored.split(LOGIT_TOKENS), own.split(LOGIT_TOKENS), strict=True):
            first, second = (self.target.logits(part).argmax(dim=-1) for part in parts)
            agreeing += (first == second).sum()
        self._positions += len(kept)
        self._agreeing += int(agreeing)
        if sample.last_hidden.codec.name in LOSSY:
            self._min_agreement = self.limits.min_argmax_agreement
        else:
            self._min_agreement = MIN_AGREEMENT[self.target.dtype]


def relative_difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| over all entries."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def kept_positions(spans: Tensor) -> Tensor:
    """The positions [T'] that spans [n, 2] (start, length) cover."""
    ranges = [torch.arange(start, start + length) for start, length in spans.tolist()]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.long)


def _name(sample_id: int) -> str:
    return f"sample {sample_id:016x}"
