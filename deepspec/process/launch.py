"""Starting the heavy work in child processes: `python -m deepspec <verb>`, followed by its events,
ended with its parent.

A child runs under `guard`, so that whatever happens here (an exception, Ctrl-C, SIGTERM, SIGKILL)
nothing of it is left. Its JSON events and log lines are handed on as they come, and its error is
raised again as the same class.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from io import RawIOBase
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

from deepspec.errors import (
    EXIT_TRANSIENT,
    ChildFailed,
    DeepSpecError,
    TransientError,
    error_from_json,
)
from deepspec.process.shard_ranges import shard_list
from deepspec.process.supervisor import KILLED, SWEEP_S, kill_marked

GRACE_S = 5.0  # between SIGTERM and SIGKILL
# in the environment of a child and all its descendants, so that they can be found
MARK = "DEEPSPEC_CHILD"
LAST_LINES, TICK_S = 8, 0.5

OnEvent = Callable[[dict[str, Any]], None]
OnLine = Callable[[str], None]


class Stopped(DeepSpecError):
    """The child was ended on request: its scope was left, by Ctrl-C, a cancelled run or another
    error.
    """


class RunRequest(NamedTuple):
    """What a user asked for: a recipe or run file, overrides, and the store."""

    source: str
    overrides: tuple[str, ...] = ()
    store: str | None = None

    def arguments(self) -> list[str]:
        sets = [part for override in self.overrides for part in ("--set", override)]
        return [self.source, *sets, *(["--store", self.store] if self.store else [])]

    def command(self, verb: str, shards: Sequence[int] | None = None) -> list[str]:
        """`python -m deepspec VERB ...` for these shards, or for all that is missing."""
        chosen = [] if shards is None else ["--shards", shard_list(shards)]
        return [sys.executable, "-m", "deepspec", verb, *self.arguments(), *chosen]

    def shown(self, verb: str, shards: Sequence[int] | None = None) -> str:
        """The command as a user would type it."""
        return shlex.join(["python", *self.command(verb, shards)[1:]])


class Scope:
    """The children that are to end together, each within `GRACE_S + patience_s` of being asked
    to.
    """

    def __init__(self, patience_s: float = 0.0) -> None:
        self.closed, self.patience_s = False, patience_s
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A guarded child.

        Raises:
            Stopped: the scope is closed; nothing is started in it any more, not even by a retry.
        """
        guarded = [
            sys.executable,
            "-m",
            "deepspec.process.supervisor",
            str(GRACE_S + self.patience_s),
            *command,
        ]
        with self._lock:
            if self.closed:
                raise Stopped(f"{name_of(command)} was not started: the run is being ended")
            # A session of its own: Ctrl-C in the terminal goes to this process alone, which ends
            # the children in order.
            child = subprocess.Popen(
                guarded, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=dict(env), start_new_session=True
            )
            self._children.add(child)
        return child

    def end(self, child: subprocess.Popen[bytes], mark: str) -> None:
        """Cut the child's lifeline and return when nothing of it runs any more."""
        cut_lifeline(child)
        try:
            child.wait(GRACE_S + self.patience_s + SWEEP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.returncode < 0:  # nobody swept up behind the guard
            kill_marked(f"{MARK}={mark}")
        self._children.discard(child)

    def close(self) -> None:
        with self._lock:
            self.closed = True
            children = list(self._children)
        for child in children:  # each is waited for by the thread that runs it, in `end`
            cut_lifeline(child)
        deadline = time.monotonic() + GRACE_S + self.patience_s + SWEEP_S
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))


_scope: ContextVar[Scope] = ContextVar("scope", default=Scope())  # noqa: B039  (the process's own, never closed)
# that of the children started here; work done elsewhere for it ends when it is closed
current_scope = _scope.get


@contextlib.contextmanager
def scope(patience_s: float = 0.0) -> Iterator[Scope]:
    """However this block is left, no child that was started in it runs any more (threads: those
    that copied its context).
    """
    inner = Scope(patience_s)
    token = _scope.set(inner)
    try:
        yield inner
    finally:
        _scope.reset(token)
        inner.close()


def run_child(
    command: Sequence[str],
    *,
    on_event: OnEvent,
    on_line: OnLine,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    log_path: Path | None = None,
) -> None:
    """Run a command to its end; both callbacks are called in this thread, and everything it says
    goes to `log_path`.

    Raises:
        DeepSpecError: the error that the child reported, as its own class.
        TransientError: it was killed by a signal, or took longer than `timeout_s`.
        Stopped: its scope was left.
        ChildFailed: it failed without saying why; its last lines are in the message.
    """
    owner, mark, ear = _scope.get(), uuid.uuid4().hex, _Ear(on_event, on_line, log_path)
    child = owner.start(command, {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), MARK: mark})
    try:
        ear.listen(child, timeout_s)
    finally:
        owner.end(child, mark)
    if child.returncode and owner.closed:
        raise Stopped(f"{name_of(command)} was ended with its run")
    if child.returncode:
        raise ear.error(name_of(command), child.returncode)


class _Ear:
    """Hears a child's two pipes, keeps what it said last, and knows what its end meant."""

    def __init__(self, on_event: OnEvent, on_line: OnLine, log_path: Path | None) -> None:
        self.on_event, self.on_line, self.log_path = on_event, on_line, log_path or Path(os.devnull)
        self.where = f"its log is {log_path}" if log_path else ""
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self.failure: dict[str, Any] | None = None
        self.late, self.log_is_whole = False, True
        self.log_path.parent.mkdir(parents=True, exist_ok=True)

    def listen(self, child: subprocess.Popen[bytes], timeout_s: float | None) -> None:
        """Hand on every line until both pipes end, the guard is dead, or the time is up."""
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            log = stack.enter_context(self.log_path.open("ab", buffering=0))
            for pipe in (child.stdout, child.stderr):
                selector.register(stack.enter_context(pipe), selectors.EVENT_READ, bytearray())  # type: ignore[arg-type]
            while selector.get_map() and not self.late:
                ready = selector.select(TICK_S)
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    self.keep(log, data)
                    self.hear(key.data, data or b"\n")
                    if not data:
                        selector.unregister(key.fileobj)
                if not ready and child.poll() is not None:  # an orphan holds the pipes open
                    return
                self.late = time.monotonic() >= deadline

    def keep(self, log: RawIOBase, data: bytes) -> None:
        """What a child says while it waits for room on a full disk may not fit into its log
        there: that must not end it.
        """
        try:
            log.write(data)
        except OSError as error:
            if self.log_is_whole:
                self.on_line(f"launch WARNING {self.log_path} misses lines from here on: {error}")
            self.log_is_whole = False

    def hear(self, heard: bytearray, data: bytes) -> None:
        *lines, heard[:] = (heard + data).split(b"\n")
        for raw in lines:
            # a bar redrawn in place: its last state
            line = raw.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
            # what follows an error is its echo: other ranks, a launcher's stack trace
            if line.strip() and self.failure is None:
                self.hear_line(line)

    def hear_line(self, line: str) -> None:
        event = _event(line)
        if event is None:
            self.last.append(line)
            self.on_line(line)
        elif event["event"] == "error":
            self.failure = event
        else:
            self.on_event(event)

    def error(self, name: str, code: int) -> DeepSpecError:
        if self.failure is not None:
            found = error_from_json(self.failure)
            unknown = self.failure.get("transient") and type(found) is ChildFailed
            return (
                TransientError(found.what, where=found.where, fix=found.fix) if unknown else found
            )
        if self.late:
            return TransientError(
                f"{name} did not finish in time",
                where=self.where,
                fix="it is tried again by itself",
            )
        said = "; it last said:\n    " + "\n    ".join(self.last) if self.last else ""
        number = -code if code < 0 else code - KILLED
        if number in set(signal.Signals):
            what = f"{name} was killed by {signal.Signals(number).name}{said}"
            return TransientError(
                what,
                where=self.where,
                fix="run it again: only what is missing is done (SIGKILL: often out of memory)",
            )
        kind = TransientError if code == EXIT_TRANSIENT else ChildFailed
        return kind(
            f"{name} ended with exit code {code} without saying why{said}",
            where=self.where,
            fix="see its last lines above",
        )


def _event(line: str) -> dict[str, Any] | None:
    with contextlib.suppress(json.JSONDecodeError):
        found = json.loads(line) if line.startswith("{") else None
        if isinstance(found, dict) and isinstance(found.get("event"), str):
            return found
    return None


def cut_lifeline(child: subprocess.Popen[bytes]) -> None:
    if child.stdin is not None:
        child.stdin.close()


def name_of(command: Sequence[str]) -> str:
    """`answers` for `python -m deepspec answers ...`, the program's name for anything else."""
    words = list(command)
    return words[words.index("deepspec") + 1] if "deepspec" in words[:-1] else Path(words[0]).name
