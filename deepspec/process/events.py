"""What a stage reports while it works: small mappings given to a `Report`, for a bar, a log or the
parent process.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

Report = Callable[[dict[str, Any]], None]


def silent(event: dict[str, Any]) -> None:
    """A report that shows nothing."""


def reports_to_parent() -> bool:
    """Whether this process writes its events for a parent (`DEEPSPEC_EVENTS=1`)."""
    return os.environ.get("DEEPSPEC_EVENTS") == "1"


def json_lines(event: dict[str, Any]) -> None:
    """Write an event to stdout, one JSON object a line: how a child reports to its parent."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def parse_event(line: str) -> dict[str, Any] | None:
    """The event that `json_lines` wrote; None for a line of anything else."""
    with contextlib.suppress(json.JSONDecodeError):
        found = json.loads(line) if line.startswith("{") else None
        if isinstance(found, dict) and isinstance(found.get("event"), str):
            return found
    return None


def answering_note(events: Sequence[Mapping[str, Any]]) -> str:
    """The newest `answering` events of all lanes added up, in one line for a bar."""

    def total(name: str) -> float:
        return sum(event[name] for event in events)

    tokens_per_s = total("tokens_per_s")
    truncated = sum(event["truncated_share"] * event["tokens_per_s"] for event in events)
    left = [event["left_s"] for event in events if event["left_s"] is not None]
    parts = [
        f"{total('rows'):,} of {total('rows_todo'):,} rows",
        f"{tokens_per_s:,.0f} tokens/s",
        f"{total('in_flight')} in flight",
    ]
    parts += [f"{total(name):,} {name}" for name in ("errors", "refused") if total(name)]
    if truncated:
        parts.append(f"{truncated / max(tokens_per_s, 1e-9):.1%} truncated")
    if left:
        parts.append(f"{timedelta(seconds=max(left))} left")
    return ", ".join(parts)


def progress_texts(numbers: Mapping[str, Any]) -> list[str]:
    """The numbers of a stage's `progress` event, each with its name or unit."""
    return [_with_unit(name, value) for name, value in numbers.items()]


def _with_unit(name: str, value: Any) -> str:
    if name == "tokens_per_s":
        return f"{value:,.0f} tokens/s"
    if name == "left_s":
        return f"{timedelta(seconds=value)} left"
    return f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}"
