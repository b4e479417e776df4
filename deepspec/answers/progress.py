"""How far the answers are: one event now and then, for the terminal's bar and for the flow."""

import time
from collections.abc import Iterable

from deepspec.artifacts.shard_loop import Work
from deepspec.process.events import Report
from deepspec.target.conversation import Outcome, Refused, Turn


class AnswerProgress:
    """Counts of rows, tokens and requests, published as an `answering` event."""

    def __init__(self, todo: Iterable[Work], report: Report, *, every_s: float) -> None:
        """`publish_if_due` publishes at most every `every_s` seconds."""
        self.report = report
        self.rows = 0  # whose conversation is over
        self.in_flight = 0
        self.errors = 0  # attempts that failed
        self._every_s = every_s
        self._rows_todo = sum(work.upstream.rows for work in todo)
        self._turns = 0
        self._tokens = 0
        self._truncated = 0
        self._refused = 0
        self._began = time.monotonic()
        self._published = self._began

    def count(self, outcome: Outcome) -> None:
        """Add a new outcome to the counts of answers, tokens and refusals."""
        self._refused += isinstance(outcome, Refused)
        if isinstance(outcome, Turn):
            self._turns += 1
            self._tokens += outcome.num_tokens
            self._truncated += outcome.finish_reason == "length"

    def publish_if_due(self) -> None:
        """Publish unless the last event is too recent."""
        if time.monotonic() - self._published >= self._every_s:
            self.publish()

    def publish(self) -> None:
        """Report the counts, tokens per second, and seconds left at the rate so far."""
        self._published = time.monotonic()
        seconds = max(self._published - self._began, 1e-3)
        left_s = seconds * (self._rows_todo / self.rows - 1) if self.rows else None
        self.report(
            {
                "event": "answering",
                "stage": "answers",
                "rows": self.rows,
                "rows_todo": self._rows_todo,
                "tokens": self._tokens,
                "tokens_per_s": round(self._tokens / seconds, 1),
                "in_flight": self.in_flight,
                "errors": self.errors,
                "refused": self._refused,
                "truncated_share": round(self._truncated / max(self._turns, 1), 4),
                "left_s": left_s if left_s is None else round(max(0.0, left_s)),
            }
        )
