"""How far the answers are: one event now and then, for the bar on the terminal and for the
orchestrator (a JSON line).
"""

from __future__ import annotations

import time
from collections.abc import Collection

from deepspec.artifacts.shard_loop import Work
from deepspec.process.events import Report
from deepspec.target.conversation import Outcome, Refused, Turn


class Meter:
    """Counts what is heard; `tell` reports it, at most every `every_s` seconds."""

    def __init__(self, todo: Collection[Work], report: Report, *, every_s: float) -> None:
        self.report, self._every_s = report, every_s
        self._rows_todo = sum(work.upstream.rows for work in todo)
        (
            self.rows,
            self.answers,
            self.tokens,
            self.truncated,
            self.refused,
            self.errors,
            self.in_flight,
        ) = (0,) * 7
        self._began = self._told = time.monotonic()

    def heard(self, outcome: Outcome) -> None:
        self.refused += isinstance(outcome, Refused)
        if not isinstance(outcome, Turn):
            return
        self.answers += 1
        self.tokens += outcome.num_tokens
        self.truncated += outcome.finish_reason == "length"

    def tell(self, *, now: bool = False) -> None:
        """Report if it is time, or `now`: rows ended of those to do, tokens per second, seconds
        left at the rate so far.
        """
        if not now and time.monotonic() - self._told < self._every_s:
            return
        self._told = time.monotonic()
        seconds = max(self._told - self._began, 1e-3)
        left_s = seconds * (self._rows_todo / self.rows - 1) if self.rows else None
        self.report(
            {
                "event": "answering",
                "stage": "answers",
                "rows": self.rows,
                "rows_todo": self._rows_todo,
                "tokens": self.tokens,
                "tokens_per_s": round(self.tokens / seconds, 1),
                "in_flight": self.in_flight,
                "errors": self.errors,
                "refused": self.refused,
                "truncated_share": round(self.truncated / max(self.answers, 1), 4),
                "left_s": None if left_s is None else round(max(0.0, left_s)),
            }
        )
