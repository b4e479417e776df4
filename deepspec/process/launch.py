"""Starting the heavy work in child processes: `python -m deepspec <verb>`.

A child runs under `supervisor`, so that whatever happens here (an exception, Ctrl-C, SIGTERM,
SIGKILL) nothing of it is left. Its JSON events and log lines are passed on as they come, and its
error, an event too, is raised again as the same class.
"""

import contextlib
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

from deepspec.errors import (
    EXIT_TRANSIENT,
    ChildFailed,
    DeepSpecError,
    TransientError,
    error_from_json,
)
from deepspec.process.events import Report, parse_event
from deepspec.process.scopes import MARK, Stopped, current_scope, name_of
from deepspec.process.shard_ranges import shard_list
from deepspec.process.supervisor import KILLED

LAST_LINES, TICK_S = 8, 0.5
# No reason of an end: a web server's requests, and the frames of a stack trace, which may stand
# between the reason and the end (of vLLM's engine and of the server that waited for it, say).
NO_REASON = re.compile(r'"[A-Z]+ \S+ HTTP/\d|(?:^|\] )(?: {2}File "| {4})')
OnLine = Callable[[str], None]


class RunRequest(NamedTuple):
    """A run as its user typed it: a recipe or run file, overrides, and the store."""

    source: str
    overrides: tuple[str, ...] = ()
    store: str | None = None

    def arguments(self) -> list[str]:
        """The run as arguments of a command line."""
        sets = [part for override in self.overrides for part in ("--set", override)]
        return [self.source, *sets, *(["--store", self.store] if self.store else [])]

    def command(self, verb: str, shards: Sequence[int] | None = None) -> list[str]:
        """`python -m deepspec VERB ...` for these shards, or for all that is missing."""
        chosen = [] if shards is None else ["--shards", shard_list(shards)]
        return [sys.executable, "-m", "deepspec", verb, *self.arguments(), *chosen]

    def shown(self, verb: str, shards: Sequence[int] | None = None) -> str:
        """The command as a user would type it."""
        return shlex.join(["python", *self.command(verb, shards)[1:]])


def run_child(
    command: Sequence[str],
    *,
    on_event: Report,
    on_line: OnLine,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    log_path: Path | None = None,
) -> None:
    """Run a command to its end; both callbacks are called in this thread.

    `log_path` receives everything that it prints. An event `stop_time` of the child grants it that
    many seconds beyond the usual five, from then on, to end after a request to.

    Raises:
        DeepSpecError: the error that the child reported, as its own class.
        TransientError: it was killed by a signal, or took longer than `timeout_s`.
        Stopped: its scope was left.
        ChildFailed: it failed without an error event; its last lines are in the message.
    """
    owner, mark = current_scope(), uuid.uuid4().hex

    def take(event: dict[str, Any]) -> None:
        if event["event"] == "stop_time":
            owner.grant(child, event["seconds"])
        on_event(event)

    output = ChildOutput(take, on_line, log_path)
    child = owner.start(command, {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), MARK: mark})
    try:
        output.follow(child, timeout_s)
    finally:
        owner.end(child, mark)
    if child.returncode and owner.closed:
        raise Stopped(f"{name_of(command)} was ended with its run")
    if child.returncode:
        raise output.error(name_of(command), child.returncode)


class ChildOutput:
    """Passes a child's events and lines on, keeps its last lines, and knows what its end means."""

    def __init__(self, on_event: Report, on_line: OnLine, log_path: Path | None) -> None:
        self.on_event, self.on_line, self.log_path = on_event, on_line, log_path or Path(os.devnull)
        self.where = f"its log is {log_path}" if log_path else ""
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.failure: DeepSpecError | None = None  # the first that the child reported
        self.late, self.log_is_whole = False, True
        self.log_path.parent.mkdir(parents=True, exist_ok=True)

    def follow(self, child: subprocess.Popen[bytes], timeout_s: float | None) -> None:
        """Pass on every line until both pipes end, the supervisor is dead, or the time is up."""
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            log = stack.enter_context(self.log_path.open("ab", buffering=0))
            for pipe in (child.stdout, child.stderr):
                selector.register(stack.enter_context(pipe), selectors.EVENT_READ, bytearray())  # type: ignore[arg-type]
            while selector.get_map() and not self.late:
                ready = selector.select(TICK_S)
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    self._log(log, data)
                    self._take(key.data, data or b"\n", has_events=key.fileobj is child.stdout)
                    if not data:
                        selector.unregister(key.fileobj)
                if not ready and child.poll() is not None:  # an orphan holds the pipes open
                    return
                self.late = time.monotonic() >= deadline

    def _log(self, log: RawIOBase, data: bytes) -> None:
        """A child that waits for room on a full disk must not be ended by its log on that disk."""
        try:
            log.write(data)
        except OSError as error:
            if self.log_is_whole:
                self.on_line(f"launch WARNING {self.log_path} misses lines from here on: {error}")
            self.log_is_whole = False

    def _take(self, begun: bytearray, data: bytes, *, has_events: bool) -> None:
        """Add `data` to the line that has begun, and pass on what is whole."""
        *lines, begun[:] = (begun + data).split(b"\n")
        for raw in lines:
            # of a bar redrawn in place its last state
            line = raw.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
            # What follows an error is its echo: other ranks, a launcher's stack trace.
            if not line.strip() or self.failure is not None:
                continue
            event = parse_event(line) if has_events else None
            if event is None:
                if not NO_REASON.search(line):
                    self.last.append(line)
                self.on_line(line)
            elif event["event"] == "error":
                self.failure = error_from_json(event)
            else:
                self.on_event(event)

    def error(self, name: str, code: int) -> DeepSpecError:
        """Why the child that ended with this exit code failed."""
        if self.failure is not None:
            return self.failure
        if self.late:
            what, fix = f"{name} did not finish in time", "it is tried again by itself"
            return TransientError(what, where=self.where, fix=fix)
        lines = "; its last lines were:\n    " + "\n    ".join(self.last) if self.last else ""
        number = -code if code < 0 else code - KILLED
        if number in set(signal.Signals):
            what = f"{name} was killed by {signal.Signals(number).name}{lines}"
            fix = "run it again: only what is missing is done (SIGKILL: often out of memory)"
            return TransientError(what, where=self.where, fix=fix)
        kind = TransientError if code == EXIT_TRANSIENT else ChildFailed
        what = f"{name} ended with exit code {code} and reported no error{lines}"
        return kind(what, where=self.where, fix="see its last lines above")
