"""How fast the target steps when a step verifies b tokens: measured once, looked up by policies.

b tokens of one forward pass, over all requests together.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import ValidationError

from deepspec.artifacts.results import CurvePoints
from deepspec.errors import DataError, OutOfMemory
from deepspec.evaluate.clock import device_time
from deepspec.evaluate.rounds import Floats
from deepspec.model.memory import naming_oom
from deepspec.target.model import Target

log = logging.getLogger(__name__)

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXT_TOKENS = 256
ROUNDS = 15


class SpeedCurve:
    """SPS(b): forward passes per second at b tokens.

    Between measured points the seconds of a step are interpolated linearly. Before the first point
    they are those of that point; after the last they grow with the tokens, as where computing is
    the limit. More tokens never take less time: a point slower than a later one was disturbed while
    it was measured, and counts as fast as that one.

    Raises:
        DataError: no points, token counts that do not ascend from 1 on, or speeds that are not
            above 0.
    """

    def __init__(
        self, tokens: ArrayLike, steps_per_second: ArrayLike, *, where: str = "the speed curve"
    ) -> None:
        counts = np.asarray(tokens, dtype=np.float64)
        speeds = np.asarray(steps_per_second, dtype=np.float64)
        wrong = ""
        if counts.ndim != 1 or counts.shape != speeds.shape or not len(counts):
            wrong = f"{counts.size} token counts and {speeds.size} speeds make no curve"
        elif counts[0] < 1 or (np.diff(counts) <= 0).any():
            wrong = "the token counts do not ascend from at least 1"
        elif not (np.isfinite(speeds) & (speeds > 0)).all():
            wrong = "a speed is not a number above 0"
        if wrong:
            fix = "give a speed above 0 for each token count, the counts ascending from at least 1"
            raise DataError(wrong, where=where, fix=fix)
        self.tokens, self.steps_per_second = counts, speeds
        self._seconds = np.minimum.accumulate(1.0 / speeds[::-1])[::-1]

    def seconds(self, num_tokens: ArrayLike) -> Floats:
        """Of one step that verifies so many tokens (any shape)."""
        wanted = np.asarray(num_tokens, dtype=np.float64)
        beyond = np.maximum(1.0, wanted / self.tokens[-1])
        found: Floats = np.interp(wanted, self.tokens, self._seconds) * beyond
        return found

    def __call__(self, num_tokens: ArrayLike) -> Floats:
        """Steps per second at so many tokens (any shape)."""
        found: Floats = 1.0 / self.seconds(num_tokens)
        return found

    def smooth(self) -> "SpeedCurve":
        """The highest curve at or under this one in seconds whose every further token costs at
        least as much as the last.

        On such a curve the scheduler's early stop loses nothing. Noise makes stairs, before which
        the scheduler would stop; noise also only ever adds time, so that the lower hull is what the
        machine can do.
        """
        kept: list[int] = []
        for number in range(len(self.tokens)):
            while len(kept) > 1 and self._slope(*kept[-2:]) >= self._slope(kept[-1], number):
                kept.pop()
            kept.append(number)
        return SpeedCurve(self.tokens[kept], 1.0 / self._seconds[kept])

    def _slope(self, left: int, right: int) -> float:
        """Seconds that a further token costs between two points."""
        more = self._seconds[right] - self._seconds[left]
        return float(more / (self.tokens[right] - self.tokens[left]))

    def points(self) -> CurvePoints:
        """The measured points."""
        return CurvePoints(
            tokens=self.tokens.astype(int).tolist(), steps_per_second=self.steps_per_second.tolist()
        )


def read_curve(path: Path) -> SpeedCurve:
    """The curve in a file {"tokens": [...], "steps_per_second": [...]}.

    Raises:
        DataError: no such file, or no such curve in it.
    """
    fix = 'write {"tokens": [1, 8, 64], "steps_per_second": [50.0, 49.0, 40.0]}, as measured'
    try:
        points = CurvePoints.model_validate_json(path.read_bytes())
    except OSError as error:
        what = f"the speed curve cannot be read: {error.strerror}"
        raise DataError(what, where=str(path), fix=fix) from None
    except ValidationError:
        raise DataError("the file holds no speed curve", where=str(path), fix=fix) from None
    return SpeedCurve(points.tokens, points.steps_per_second, where=str(path))


@torch.inference_mode()
def profile(target: Target, *, block_size: int) -> SpeedCurve:
    """The curve of this target on this machine, its logits included, smoothed.

    The fastest of `ROUNDS` after a warm-up counts for each size: other work on the machine only
    ever adds time. A step of b tokens is one verification: as few rows as hold them at `block_size`
    + 1 each, all of one length, each after `CONTEXT_TOKENS` of its own. Counts that make no such
    rectangle are measured at the next larger one. The sizes alternate, so that a machine busy for a
    while slows them all alike. The curve ends before the first size that memory has no room for.

    Raises:
        OutOfMemory: that is the smallest one.
    """
    pairs = (_shape(count, block_size) for count in TOKENS)
    shapes = {rows * width: (rows, width) for rows, width in pairs}
    steps = dict[int, Callable[[], float]]()
    for size in sorted(shapes):
        too_large = OutOfMemory(
            f"a verification of {size} tokens, each row after {CONTEXT_TOKENS}, does not fit into "
            "memory next to target and draft",
            where="resources.devices.speed_curve",
            fix="measure the curve on a device with more memory and give it as a file",
        )
        try:
            with naming_oom(too_large):
                step = _step(target, *shapes[size])
                step()  # the warm-up
        except OutOfMemory as error:
            if not steps:
                raise
            log.warning("the speed curve ends before that: %s", error.what)
            break
        steps[size] = step
    seconds = np.array([[step() for step in steps.values()] for _ in range(ROUNDS)])
    return SpeedCurve(list(steps), 1.0 / seconds.min(axis=0)).smooth()


def _shape(num_tokens: int, block_size: int) -> tuple[int, int]:
    """Rows, and tokens per row."""
    rows = -(-num_tokens // (block_size + 1))
    return rows, -(-num_tokens // rows)


def _step(target: Target, rows: int, width: int) -> Callable[[], float]:
    shape = (rows, CONTEXT_TOKENS + width)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(target.text_config.vocab_size, shape, generator=generator).to(target.device)
    context, new = ids.split([CONTEXT_TOKENS, width], dim=1)
    cache = target.shelf.make(target.new_cache, *shape)
    target.forward(context, cache)
    # Every step overwrites what the one before it wrote.
    cache.lengths = [CONTEXT_TOKENS] * rows

    def logits(new: torch.Tensor) -> tuple[torch.Tensor]:
        return (target.logits(target.forward(new, cache).last_hidden),)

    def step() -> float:
        started = device_time(target.device)
        cache.run("logits", logits, (new,), num_new=width)
        return device_time(target.device) - started

    return step
