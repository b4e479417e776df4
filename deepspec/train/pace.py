"""How fast a training goes, and how long it will take."""

from __future__ import annotations

import time


class Pace:
    """Steps and tokens since training began in this process: what a resumed one did before took time that nobody knows."""

    def __init__(self, first: int, total: int) -> None:
        self.first, self.total, self.tokens = first, total, 0
        self._began = time.monotonic()

    def add(self, num_tokens: int) -> None:
        self.tokens += num_tokens

    def read(self, done: int) -> dict[str, float]:
        """Tokens per second, and the seconds left to the last step at that speed, checkpoints included; `done` steps are."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        left_s = (self.total - done) * seconds / max(done - self.first, 1)
        return {"tokens_per_s": round(self.tokens / seconds, 1), "left_s": round(left_s)}
