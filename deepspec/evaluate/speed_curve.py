"""How fast the target steps when a step verifies b tokens: measured once, then looked up by the
scheduler.

b tokens of one forward pass, over all requests together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import ValidationError

from deepspec.artifacts.results import CurvePoints
from deepspec.errors import DataError
from deepspec.evaluate.rounds import Floats
from deepspec.target.model import Target

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXT_TOKENS = 256
ROUNDS = 15


class SpeedCurve:
    """SPS(b): forward passes per second at b tokens.

    Between measured points the seconds of a step are interpolated linearly. In front of the first
    point they are its own; behind the last they grow with the tokens, as where computing is the
    limit. More tokens never take less time: a point slower than a later one was disturbed while it
    was measured, and counts as fast as that one.

    Raises:
        DataError: no points, token counts that do not ascend from 1 on, or speeds that are not
            above 0.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        steps_per_second: Sequence[float],
        *,
        where: str = "the speed curve",
    ) -> None:
        counts, speeds = (
            np.asarray(tokens, dtype=np.float64),
            np.asarray(steps_per_second, dtype=np.float64),
        )
        fix = "give tokens and steps_per_second as two lists of one length, the tokens ascending from at least 1"
        if counts.ndim != 1 or counts.shape != speeds.shape or not len(counts):
            raise DataError(
                f"{counts.size} token counts and {speeds.size} speeds make no curve",
                where=where,
                fix=fix,
            )
        if counts[0] < 1 or (np.diff(counts) <= 0).any():
            raise DataError("the token counts do not ascend from at least 1", where=where, fix=fix)
        if not (np.isfinite(speeds) & (speeds > 0)).all():
            raise DataError("a speed is not a number above 0", where=where, fix=fix)
        self.tokens, self.steps_per_second = counts, speeds
        self._seconds = np.minimum.accumulate(1.0 / speeds[::-1])[::-1]

    def seconds(self, num_tokens: ArrayLike) -> Floats:
        """Of one step that verifies so many tokens (any shape)."""
        wanted = np.asarray(num_tokens, dtype=np.float64)
        found: Floats = np.interp(wanted, self.tokens, self._seconds) * np.maximum(
            1.0, wanted / self.tokens[-1]
        )
        return found

    def __call__(self, num_tokens: ArrayLike) -> Floats:
        found: Floats = 1.0 / self.seconds(num_tokens)
        return found

    def smooth(self) -> SpeedCurve:
        """The highest curve at or under this one in seconds whose every further token costs at
        least as much as the last.

        On such a curve the scheduler's early stop gives nothing away. Noise makes stairs in it, in
        front of which the scheduler would stop; noise also only ever adds time, so that the lower
        hull is what the machine can do.
        """
        kept: list[tuple[float, float]] = []
        for count, seconds in zip(self.tokens.tolist(), self._seconds.tolist(), strict=True):
            while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(
                kept[-1], (count, seconds)
            ):
                kept.pop()
            kept.append((count, seconds))
        return SpeedCurve([int(count) for count, _ in kept], [1.0 / seconds for _, seconds in kept])

    def points(self) -> CurvePoints:
        """The measured points."""
        return CurvePoints(
            tokens=self.tokens.astype(int).tolist(), steps_per_second=self.steps_per_second.tolist()
        )


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


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
def profile(
    target: Target,
    *,
    block_size: int,
    tokens: Sequence[int] = TOKENS,
    context_tokens: int = CONTEXT_TOKENS,
    rounds: int = ROUNDS,
) -> SpeedCurve:
    """The curve of this target on this machine, its logits included, smoothed.

    Of each size the fastest of `rounds` after a warm-up counts: other work on the machine only ever
    adds time. A step of b tokens is one verification: as few rows as hold them at `block_size` + 1
    each, all of one length, each behind `context_tokens` of its own. Counts that make no such
    rectangle are measured at the next larger one. The sizes take turns, so that a machine busy for
    a while slows them all alike.
    """
    shapes = dict.fromkeys(_shape(count, block_size) for count in sorted(tokens))
    steps = {rows * width: _step(target, rows, width, context_tokens) for rows, width in shapes}
    taken: dict[int, list[float]] = {count: [] for count in sorted(steps)}
    for number in range(rounds + 1):
        for count in taken:
            seconds = steps[count]()
            if number:  # the first is the warm-up
                taken[count].append(seconds)
    return SpeedCurve(list(taken), [1.0 / min(seconds) for seconds in taken.values()]).smooth()


def _shape(num_tokens: int, block_size: int) -> tuple[int, int]:
    """Rows and tokens per row."""
    rows = -(-num_tokens // (block_size + 1))
    return rows, -(-num_tokens // rows)


def _step(target: Target, rows: int, width: int, context_tokens: int) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        target.text_config.vocab_size, (rows, context_tokens + width), generator=generator
    ).to(target.device)
    cache = target.new_cache(rows, context_tokens + width)
    target.forward(ids[:, :context_tokens], cache)
    # and there they stay: every step overwrites the one before
    cache.lengths = [context_tokens] * rows

    def step() -> float:
        started = _now(target)
        target.logits(target.forward(ids[:, context_tokens:], cache).last_hidden)
        return _now(target) - started

    return step


def _now(target: Target) -> float:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)
    return time.perf_counter()
