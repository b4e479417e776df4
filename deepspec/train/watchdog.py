"""A training that stands still ends by itself, and says where it stood, instead of holding its
GPUs for ever.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self

from deepspec.errors import EXIT_TRANSIENT, TransientError
from deepspec.process.events import Report

log = logging.getLogger(__name__)

# ranks stall together: all have dumped their stacks before one reports, upon which all are ended
LINGER_S = 2.0


class Watchdog:
    """Ends the process with "try again" when `beat` was not called for `limit_s` seconds while the
    block was in progress.

    Called for every step, and for every shard that is captured for one.
    """

    def __init__(self, limit_s: float, report: Report) -> None:
        self.limit_s, self.report = limit_s, report
        self._heard, self._left = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        self._heard.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()
        self._heard.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._left.is_set():
            if not self._heard.wait(self.limit_s):
                self._end()
            self._heard.clear()

    def _end(self) -> None:
        """The main thread may never return from where it is, so nothing here waits for it or
        unwinds it.
        """
        faulthandler.dump_traceback(all_threads=True)
        time.sleep(LINGER_S)
        what = f"no training step was finished for {self.limit_s / 60:g} minutes (resources.retries.stall_minutes)"
        fix = "run it again: it goes on from its newest checkpoint; where each thread stood is in the log"
        error = TransientError(what, fix=fix)
        log.error("stage=train %s", what)
        self.report({"event": "error", **error.to_json(), "transient": error.transient})
        sys.stdout.flush()
        os._exit(EXIT_TRANSIENT)
