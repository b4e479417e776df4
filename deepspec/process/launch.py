"""Starting the heavy work in child processes: `python -m deepspec <verb>`.

A child runs under `supervisor`, so that whatever happens here (an exception, Ctrl-C, SIGTERM,
SIGKILL) nothing of it is left. Its JSON events and log lines are passed on as they come, and its
error, an event too, is raised again as the same class.
"""

import os
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from deepspec.process.child_output import ChildOutput, OnLine
from deepspec.process.events import Report
from deepspec.process.scopes import MARK, Stopped, current_scope, name_of
from deepspec.process.shard_ranges import shard_list


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

    `log_path` receives everything that it prints.

    Raises:
        DeepSpecError: the error that the child reported, as its own class.
        TransientError: it was killed by a signal, or took longer than `timeout_s`.
        Stopped: its scope was left.
        ChildFailed: it failed without an error event; its last lines are in the message.
    """
    owner, mark = current_scope(), uuid.uuid4().hex
    output = ChildOutput(on_event, on_line, log_path)
    child = owner.start(command, {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {}), MARK: mark})
    try:
        output.follow(child, timeout_s)
    finally:
        owner.end(child, mark)
    if child.returncode and owner.closed:
        raise Stopped(f"{name_of(command)} was ended with its run")
    if child.returncode:
        raise output.error(name_of(command), child.returncode)
