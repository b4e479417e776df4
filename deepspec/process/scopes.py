"""The children of a process, and the blocks of code that none of them outlives."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from subprocess import PIPE

from deepspec.errors import DeepSpecError
from deepspec.process.supervisor import SWEEP_S, kill_marked

GRACE_S = 5.0  # between SIGTERM and SIGKILL
# in the environment of a child and all its descendants, so that they can be found
MARK = "DEEPSPEC_CHILD"


class Stopped(DeepSpecError):
    """The child was ended on purpose: by Ctrl-C, a cancelled run or an error."""


class Scope:
    """Children that end together, each within `GRACE_S + patience_s` of the request to end."""

    def __init__(self, patience_s: float = 0.0) -> None:
        self.closed, self.patience_s = False, patience_s
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A child under a supervisor.

        Raises:
            Stopped: the scope is closed; nothing is started in it any more, not even by a retry.
        """
        grace_s = str(GRACE_S + self.patience_s)
        supervised = [sys.executable, "-m", "deepspec.process.supervisor", grace_s, *command]
        with self._lock:
            if self.closed:
                raise Stopped(f"{name_of(command)} was not started: the run is being ended")
            # A session of its own: Ctrl-C in the terminal goes to this process alone, which ends
            # the children in order.
            child = subprocess.Popen(
                supervised, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=env, start_new_session=True
            )
            self._children.add(child)
        return child

    def end(self, child: subprocess.Popen[bytes], mark: str) -> None:
        """Cut the child's lifeline and return when nothing of it runs any more."""
        _cut_lifeline(child)
        try:
            child.wait(GRACE_S + self.patience_s + SWEEP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.returncode < 0:  # the supervisor was killed itself and has swept up nothing
            kill_marked(MARK, mark)
        self._children.discard(child)

    def close(self) -> None:
        """Cut every child's lifeline and wait for them; none is started any more."""
        with self._lock:
            self.closed = True
            children = list(self._children)
        for child in children:  # each is waited for by the thread that runs it, in `end`
            _cut_lifeline(child)
        deadline = time.monotonic() + GRACE_S + self.patience_s + SWEEP_S
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))


PROCESS_SCOPE = Scope()  # never closed
_scope: ContextVar[Scope] = ContextVar("scope", default=PROCESS_SCOPE)
# that of the children started here; work done elsewhere for it ends when it is closed
current_scope = _scope.get


@contextlib.contextmanager
def scope(patience_s: float = 0.0) -> Iterator[Scope]:
    """However this block is left, no child that was started in it runs any more.

    Threads belong to it if they run in a copy of its context.
    """
    inner = Scope(patience_s)
    token = _scope.set(inner)
    try:
        yield inner
    finally:
        _scope.reset(token)
        inner.close()


def name_of(command: Sequence[str]) -> str:
    """`answers` for `python -m deepspec answers ...`, the program's name for anything else."""
    parts = list(command)
    return parts[parts.index("deepspec") + 1] if "deepspec" in parts[:-1] else Path(parts[0]).name


def _cut_lifeline(child: subprocess.Popen[bytes]) -> None:
    if child.stdin is not None:
        child.stdin.close()
