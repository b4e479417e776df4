"""A training that stalls ends by itself, instead of holding its GPUs, and logs where it stood; so
does one that was asked to stop and cannot.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil

from deepspec.errors import EXIT_TRANSIENT, TransientError
from deepspec.process.events import Report, silent
from deepspec.process.scopes import GRACE_S
from deepspec.process.supervisor import is_alive

log = logging.getLogger(__name__)

# Ranks stall together: all must have dumped their stacks before one reports, which ends them all.
LINGER_S = 2.0
LOOK_S = 0.5  # between two looks at the other ranks
END_S = 1.0  # that ending takes, before whoever asked for it kills the process


@contextlib.contextmanager
def watchdog(limit_s: float, report: Report) -> Iterator[Callable[[], None]]:
    """Ends the process with "try again" where what it yields is not called for `limit_s`.

    It is called for every step, and for every shard that is captured for one.
    """
    beaten, left = threading.Event(), threading.Event()

    def watch() -> None:
        while not left.is_set():
            if not beaten.wait(limit_s):
                what = f"no training step was finished for {limit_s / 60:g} minutes"
                _end(f"{what} (resources.retries.stall_minutes)", report)
            beaten.clear()

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield beaten.set
    finally:
        left.set()
        beaten.set()
        thread.join()


@contextlib.contextmanager
def ending_late_stops(stop_s: Callable[[], float], report: Report) -> Iterator[None]:
    """Ends the process with "try again" where SIGTERM comes and the block is not left within
    `stop_s`; at once where another rank of this machine has ended, without which no step can.

    In a collective, or while it waits for a GPU, the main thread runs no handler of Python's. The
    number of a signal that has one is written to a socket all the same, by the handler in C.
    """
    ours, theirs = socket.socketpair()
    ours.settimeout(0)  # `set_wakeup_fd` takes none that blocks
    ranks = _ranks_here()

    def watch() -> None:
        while signal.SIGTERM not in (numbers := theirs.recv(64)):
            if not numbers:
                return  # the block was left
        limit_s = stop_s() + GRACE_S - LINGER_S - END_S
        deadline = time.monotonic() + limit_s
        theirs.settimeout(LOOK_S)
        while time.monotonic() < deadline and all(map(is_alive, ranks)):
            with contextlib.suppress(TimeoutError):
                if not theirs.recv(64):
                    return
        if all(map(is_alive, ranks)):
            late = f"could not within {limit_s:.0f} s (resources.runner.stop_s)"
            _end(f"training was asked to stop and {late}", report)
        # Not reported: why that one has ended is the error of them all.
        _end("training was asked to stop and cannot: another rank has ended", silent)

    thread = threading.Thread(target=watch, name="stop", daemon=True)
    before = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ours.close()
        thread.join()
        theirs.close()


def _ranks_here() -> list[psutil.Process]:
    """The processes that torchrun started beside this one; none without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    return psutil.Process().parent().children()


def _end(what: str, report: Report) -> None:
    """End without unwinding the main thread, which may never return from where it is."""
    faulthandler.dump_traceback(all_threads=True)
    time.sleep(LINGER_S)
    error = TransientError(
        what,
        fix="run it again: it goes on from its newest checkpoint; where each thread stood is in "
        "the log",
    )
    log.error("stage=train %s", error.what)
    report({"event": "error", **error.to_json()})
    sys.stdout.flush()
    os._exit(EXIT_TRANSIENT)
