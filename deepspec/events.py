"""What a stage says while it works: small mappings handed to a `Report`, for a bar, a log or the parent process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

Report = Callable[[dict[str, Any]], None]


def silent(event: dict[str, Any]) -> None:
    """The report of somebody who does not look."""


def json_lines(event: dict[str, Any]) -> None:
    """One JSON object a line on stdout: how a child process reports to its parent (`DEEPSPEC_EVENTS=1`)."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()
