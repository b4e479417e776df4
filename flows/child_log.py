"""A child's log lines on their way into the run's log: at a bounded rate, for each line costs the
server's database half a kB.
"""

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
        self._left = float(at_once)
        self._at = time.monotonic()

    def take(self) -> bool:
        """Whether one was left, which is used now."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) / self._every_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class ChildLog:
    """Called with each line of one child, all of which are in the file at `path`."""

    def __init__(self, path: Path) -> None:
        self._logger = get_run_logger()
        self._path = path
        self._left_out = 0
        self._warnings = Allowance(WARNINGS_AT_ONCE, WARNING_S)
        self._others = Allowance(OTHERS_AT_ONCE, OTHER_S)

    def __call__(self, line: str) -> None:
        """Write the line into the run's log, if one is allowed now."""
        found = LEVEL.search(line[:LONGEST])
        allowance = self._warnings if found else self._others
        if not allowance.take():
            self._left_out += 1
            return
        level = logging.getLevelName(found[1]) if found else logging.INFO
        self._logger.log(level, "%s", line[:LONGEST])

    def close(self) -> None:
        """Records how many lines the run's log has not, and which file has them."""
        if self._left_out:
            self._logger.info(
                "%d lines were left out here; %s has them all", self._left_out, self._path
            )
