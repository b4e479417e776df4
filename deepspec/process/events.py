"""What a stage says while it works: small mappings handed to a `Report`, for a bar, a log or
the parent process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

Report = Callable[[dict[str, Any]], None]


def silent(event: dict[str, Any]) -> None:
    """The report of somebody who does not look."""


def reports_to_parent() -> bool:
    """Whether this process writes its events for a parent (`DEEPSPEC_EVENTS=1`)."""
    return os.environ.get("DEEPSPEC_EVENTS") == "1"


def json_lines(event: dict[str, Any]) -> None:
    """Write an event to stdout, one JSON object a line: how a child reports to its parent."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def answering_note(events: Sequence[Mapping[str, Any]]) -> str:
    """What the newest `answering` events of all lanes say together, in a few words for a bar."""
    sums = {
        key: sum(event[key] for event in events)
        for key in ("rows", "rows_todo", "tokens_per_s", "in_flight", "errors", "refused")
    }
    truncated = sum(event["truncated_share"] * event["tokens_per_s"] for event in events) / max(
        sums["tokens_per_s"], 1e-9
    )
    left = [event["left_s"] for event in events if event["left_s"] is not None]
    words = [
        f"{sums['rows']:,} of {sums['rows_todo']:,} rows",
        f"{sums['tokens_per_s']:,.0f} tokens/s",
        f"{sums['in_flight']} in flight",
    ]
    words += [f"{sums[name]:,} {name}" for name in ("errors", "refused") if sums[name]]
    words += [f"{truncated:.1%} truncated"] if truncated else []
    words += [f"{timedelta(seconds=max(left))} left"] if left else []
    return ", ".join(words)


def progress_texts(numbers: Mapping[str, Any]) -> list[str]:
    """What a stage's `progress` event counts, in a few words each."""
    forms = {"tokens_per_s": "{:,.0f} tokens/s", "left_s": "{} left"}
    values = {
        name: timedelta(seconds=value) if name == "left_s" else value
        for name, value in numbers.items()
    }
    plain = {
        name: f"{name} {{:.5g}}" if isinstance(value, float) else f"{name} {{}}"
        for name, value in values.items()
    }
    return [forms.get(name, plain[name]).format(value) for name, value in values.items()]
