"""How much of each proposed block the target verifies: all, up to the first low confidence, or what
pays (Algorithm 1).

Lossless, however wrong the confidences are, as long as slot j's confidence depends on no token from
slot j on: DSpark's sees the state of its slot, computed from mask tokens, and the token before it.
Whether slot j is verified is then decided before its token x_j has any influence: the scheduler
admits candidates in descending survival, and within a request survival only falls, so admitting is
a walk. Each step looks at the next slot of every request, a number that follows from tokens already
admitted, and either admits one or ends for all. Hence x_j, when its slot is admitted, still has the
draft's distribution given everything that was looked at, and verification turns it into the
target's distribution; when it is not admitted, the target draws that token itself.

Searching on for a better total after a step that does not improve (Appendix A) breaks this: slot j
would be admitted for the sake of slot j + 1, whose confidence depends on x_j, so that admitted
tokens no longer have the draft's distribution. The same happens under any rule if a confidence
looks at its own token, as the draft's probability of it would.

R requests, g block size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deepspec.evaluate.rounds import Bools, Floats, Ints, calibrated, cut_below
from deepspec.evaluate.speed_curve import SpeedCurve

Policy = Callable[[Floats, Bools], Ints]
"""What the batched decoder calls in each round: slots [R] to verify, 0 to g, given the draft's
confidences [R, g] and which requests are running [R]; 0 for the others."""


def schedule(confidence: Floats, curve: SpeedCurve) -> Ints:
    """Slots [R] of each request to verify, given calibrated confidences [R, g] (Algorithm 1).

    Every request has one token in the step, the anchor, and is sure of one new one. Candidates join
    in descending survival for as long as each improves tau * SPS(b), tokens expected times steps
    per second; equal ones join in the order of requests, an earlier slot before a later one. Where
    a step's seconds grow ever faster with b, what the early stop finds is the best of all prefixes;
    on a curve with stairs it may stop before one, which `SpeedCurve.smooth` takes away.
    """
    requests, block_size = confidence.shape
    survival = np.cumprod(confidence, axis=1).ravel()
    # A request's slots stand in order, and survival never rises along them.
    order = np.argsort(-survival, kind="stable")
    expected = requests + np.concatenate([[0.0], np.cumsum(survival[order])])
    throughput = expected * curve(requests + np.arange(len(expected)))
    worse = np.flatnonzero(~(throughput[1:] > throughput[:-1]))
    admitted = order[: worse[0]] if len(worse) else order
    return np.bincount(admitted // block_size, minlength=requests)


@dataclass(frozen=True)
class Fixed:
    """The first so many slots of every block; 0 is plain decoding."""

    length: int

    def __call__(self, confidence: Floats, running: Bools) -> Ints:
        """Slots to verify, as `Policy`."""
        return np.where(running, self.length, 0)


@dataclass(frozen=True)
class Threshold:
    """Each block up to the first confidence below the threshold."""

    threshold: float
    temperatures: Sequence[float] | None = None  # [g]

    def __call__(self, confidence: Floats, running: Bools) -> Ints:
        """Slots to verify, as `Policy`."""
        lengths = cut_below(calibrated(confidence, self.temperatures), self.threshold)
        return np.where(running, lengths, 0)


@dataclass(frozen=True)
class Scheduled:
    """What pays at the number of requests that are running."""

    curve: SpeedCurve
    temperatures: Sequence[float] | None = None  # [g]

    def __call__(self, confidence: Floats, running: Bools) -> Ints:
        """Slots to verify, as `Policy`."""
        lengths = np.zeros(len(confidence), dtype=np.int64)
        sure = calibrated(confidence[running], self.temperatures)
        lengths[running] = schedule(sure, self.curve)
        return lengths
