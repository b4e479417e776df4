"""A child's log lines on their way into the run's log: at a bounded rate, for each line costs
the server's database half a kB.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

from prefect import get_run_logger

LEVEL = re.compile(r" (WARNING|ERROR|CRITICAL) ")
WARNINGS_AT_ONCE, WARNING_S = 20, 10.0  # so many lines, and after that one every so many seconds
OTHERS_AT_ONCE, OTHER_S = 5, 60.0
LONGEST = 2000  # characters of a line


class Allowance:
    """So many at once; what was used comes back, one every `every_s` seconds."""

    def __init__(self, at_once: int, every_s: float) -> None:
        self._most, self._every_s = at_once, every_s
        self._left, self._at = float(at_once), time.monotonic()

    def take(self) -> bool:
        now = time.monotonic()
        self._left, self._at = min(self._most, self._left + (now - self._at) / self._every_s), now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class ChildLog:
    """Called with each line of one child, whose file at `path` has them all; `close` says how
    many the run's log has not.
    """

    def __init__(self, path: Path) -> None:
        self._logger, self._path, self._left_out = get_run_logger(), path, 0
        self._warnings, self._others = (
            Allowance(WARNINGS_AT_ONCE, WARNING_S),
            Allowance(OTHERS_AT_ONCE, OTHER_S),
        )

    def __call__(self, line: str) -> None:
        found = LEVEL.search(line[:LONGEST])
        if (self._warnings if found else self._others).take():
            self._logger.log(
                logging.getLevelName(found[1]) if found else logging.INFO, "%s", line[:LONGEST]
            )
        else:
            self._left_out += 1

    def close(self) -> None:
        if self._left_out:
            self._logger.info(
                "%d lines were left out here; %s has them all", self._left_out, self._path
            )
