"""The children of a process, and the blocks of code that none of them outlives."""

import contextlib
import os
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
    """Children that end together, each within `GRACE_S + patience_s` of the request to end, or the
    patience that it was granted since.
    """

    def __init__(self, patience_s: float = 0.0) -> None:
        self.closed, self.patience_s = False, patience_s
        self._children: dict[subprocess.Popen[bytes], float] = {}  # with the patience for each
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
            self._children[child] = self.patience_s
        return child

    def grant(self, child: subprocess.Popen[bytes], patience_s: float) -> None:
        """From now on the child has `GRACE_S + patience_s` to end, whoever asks it to."""
        with self._lock:
            if self.closed or child.stdin is None or child.stdin.closed:
                return  # it is ending, in the time that it had
            self._children[child] = patience_s
            with contextlib.suppress(BrokenPipeError):  # it has ended
                os.write(child.stdin.fileno(), f"{GRACE_S + patience_s}\n".encode())

    def end(self, child: subprocess.Popen[bytes], mark: str) -> None:
        """Cut the child's lifeline and return when nothing of it runs any more."""
        self._cut_lifelines([child])
        try:
            child.wait(GRACE_S + self._children[child] + SWEEP_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.returncode < 0:  # the supervisor was killed itself and has swept up nothing
            kill_marked(MARK, mark)
        with self._lock:
            del self._children[child]

    def close(self) -> None:
        """Cut every child's lifeline and wait for them; none is started any more."""
        with self._lock:
            self.closed = True
            children = list(self._children)
            patience_s = max(self._children.values(), default=0.0)
        self._cut_lifelines(children)
        deadline = time.monotonic() + GRACE_S + patience_s + SWEEP_S
        for child in children:  # each is waited for by the thread that runs it as well, in `end`
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))

    def _cut_lifelines(self, children: Sequence[subprocess.Popen[bytes]]) -> None:
        with self._lock:
            for child in children:
                if child.stdin is not None:
                    child.stdin.close()


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
