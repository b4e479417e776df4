"""Recorded rounds as arrays, with their confidences: calibration is fitted on them, and the
simulator of policies replays them.

N rounds, g block size.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deepspec.evaluate.counts import Rows

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Rounds(NamedTuple):
    """Rounds that proposed and verified a whole block, prompt by prompt in the order of decoding.

    Slot k (1-based) was accepted where `accepted >= k`, and was tested only where
    `accepted >= k - 1`.
    """

    confidence: Floats  # [N, g] the draft's own, in (0, 1)
    accepted: Ints  # [N] draft tokens accepted, 0 to g
    prompt: Ints  # [N] rounds of one prompt share a number

    @property
    def num_prompts(self) -> int:
        """How many prompts the rounds are of."""
        return len(np.unique(self.prompt))

    def calibrated(self, temperatures: Sequence[float]) -> "Rounds":
        """The same rounds with calibrated confidences."""
        return self._replace(confidence=calibrated(self.confidence, temperatures))

    def where(self, kept: Bools) -> "Rounds":
        """Some of the rounds."""
        return Rounds(self.confidence[kept], self.accepted[kept], self.prompt[kept])


def calibrated(confidence: Floats, temperatures: Sequence[float] | None) -> Floats:
    """Confidences [..., g] with each slot's logit divided by its temperature.

    They are unchanged without temperatures.
    """
    if temperatures is None:
        return confidence
    return tempered(confidence, 1.0 / np.asarray(temperatures))


def tempered(confidence: Floats, power: Floats | float) -> Floats:
    """sigmoid(power * logit(confidence)), written so that 0 and 1 stay what they are."""
    yes, no = confidence**power, (1.0 - confidence) ** power
    return yes / (yes + no)


def cut_below(confidence: Floats, threshold: float) -> Ints:
    """Slots [...] before the first confidence [..., g] that is below the threshold."""
    kept: Ints = np.cumprod(confidence >= threshold, axis=-1, dtype=np.int64).sum(-1)
    return kept


def headline(rows: Rows) -> Rows:
    """The rows at the first temperature and batch size, those of a run's headline figures."""
    return [
        row
        for row in rows
        if row["temperature"] == rows[0]["temperature"]
        and row["batch_size"] == rows[0]["batch_size"]
    ]


def read_rounds(rows: Rows, block_size: int) -> Rounds:
    """The rounds of `rows` with every label known; none where the draft has no confidence head.

    Left out are blocks that were cut before verification, and rounds that an accepted stop token
    ended inside the block: the target's verdict on the tokens after it was dropped. A round that
    the limit of new tokens cut is whole, as its verdict was recorded before the cut. Prompts differ
    by benchmark and number, whatever the temperature and batch size, so that a split by prompt
    never has the same prompt on both sides. Of a result decoded with `evaluate.verify` other than
    `full`, only blocks of high confidence remain: fit on one that was.
    """
    prompts: dict[tuple[str, int], int] = {}
    none = np.zeros(0, dtype=np.int64)
    parts = [Rounds(np.zeros((0, block_size)), none, none)]
    num_rounds = 0
    for row in rows:
        number = prompts.setdefault((row["benchmark"], row["prompt"]), len(prompts))
        if row["confidence"]:
            proposed, accepted, committed = (
                np.array(row[name], dtype=np.int64)
                for name in ("proposed", "accepted", "committed")
            )
            stopped = (committed == accepted) & (accepted < block_size)
            found = Rounds(np.array(row["confidence"]), accepted, np.full_like(accepted, number))
            parts.append(found.where((proposed == block_size) & ~stopped))
            num_rounds += len(accepted)
    rounds = Rounds(*map(np.concatenate, zip(*parts, strict=True)))
    if left_out := num_rounds - len(rounds.accepted):
        why = "cut short, or ended by a stop token inside the block"
        log.info("rounds=%d left_out=%d %s", len(rounds.accepted), left_out, why)
    return rounds


def split_by_prompt(rounds: Rounds) -> tuple[Rounds, Rounds]:
    """The rounds of half of the prompts, always the same half, and of the others (one more if
    odd).
    """
    prompts = np.random.default_rng(0).permutation(np.unique(rounds.prompt))
    first = np.isin(rounds.prompt, prompts[: len(prompts) // 2])
    return rounds.where(first), rounds.where(~first)
