"""When a checkpoint is due by time, and how long a training needs to stop."""

import time
from collections import deque

from deepspec.config.resources import RunnerConfig

RECENT = 10  # steps, and checkpoints, of which the slowest counts
# A request to stop that comes just after the ranks have agreed to go on waits for a checkpoint that
# may be due, for the next step, and for a checkpoint of its own.
CHECKPOINTS, MARGIN = 2, 1.5
ASSUMED_BYTES_PER_S = 200e6  # of a checkpoint, until one was saved


class CheckpointClock:
    """Times steps and checkpoints since training began in this process."""

    def __init__(self, minutes: float | None, *, num_bytes: int, runner: RunnerConfig) -> None:
        """A checkpoint has `num_bytes`, and is due so many minutes after the last one (None: never
        by time); `runner.stop_s` before what is measured.
        """
        self.limit_s = float("inf") if minutes is None else 60 * minutes
        self.is_fixed, self.least_s = runner.stop_s is not None, runner.patience_s
        self._steps = deque[float](maxlen=RECENT)
        self._checkpoints = deque[float](maxlen=RECENT)
        self._assumed_s = num_bytes / ASSUMED_BYTES_PER_S
        self._granted_s = self.least_s
        self._saved = self._marked = time.perf_counter()

    def is_due(self) -> bool:
        """Whether the minutes since the last checkpoint, or since training began, are over."""
        return time.perf_counter() - self._saved >= self.limit_s

    def step_ended(self) -> None:
        """Count the time since the last step or checkpoint as a step's."""
        self._steps.append(self._lap())

    def checkpoint_saved(self) -> None:
        """Count the time since the step ended as a checkpoint's."""
        self._checkpoints.append(self._lap())
        self._saved = self._marked

    def stop_s(self) -> float:
        """Seconds that training has, or may need, from a request to stop to its end."""
        if self.is_fixed:
            return self.least_s
        checkpoint_s = max(self._checkpoints, default=self._assumed_s)
        needed_s = max(self._steps, default=0.0) + CHECKPOINTS * checkpoint_s
        return max(self.least_s, MARGIN * needed_s)

    def request(self) -> float | None:
        """`stop_s` where whoever ends this process must be told: it is more than it was the last
        time, or less than half.
        """
        stop_s = self.stop_s()
        if self._granted_s / 2 < stop_s <= self._granted_s:
            return None
        self._granted_s = stop_s
        return stop_s

    def _lap(self) -> float:
        before, self._marked = self._marked, time.perf_counter()
        return self._marked - before
