"""Runs a command that must never outlive its parent: `python -m deepspec.process.supervisor GRACE_S
COMMAND ...`.

Standard input is a lifeline: the parent holds its other end and writes nothing, so end of file
means that the parent closed it or died, in whatever way. Then, and also when the command has ended,
no descendant is left behind; not even torchrun's ranks, each of which lives in a session of its own
where killing a process group does not reach it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

KILLED = 128  # exit status of a command that died of signal n: KILLED + n, as in a shell
# what a helper process may take to notice that its parent has ended (multiprocessing's resource
# tracker)
LEAVE_S = 1.0
SWEEP_S = 10.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class LifelineCut(Exception):
    """The parent is gone, or wants the command to end."""


def main(grace_s: float, command: list[str]) -> int:
    """Exit status of the command; all its descendants are gone."""
    prctl = find_prctl()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, cut)
    guard = os.getpid()

    def die_with_guard() -> None:
        # SIGTERM and not SIGKILL: torchrun ends its ranks on SIGTERM, and leaves them behind when
        # it is killed.
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != guard:
            os._exit(KILLED + signal.SIGTERM)

    # Only this thread exists here, so running Python between fork and exec is safe.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_guard
    )
    leave_s = LEAVE_S
    try:
        wait_with_lifeline(child)
    except LifelineCut:
        leave_s = 0.0
        end_group(child, grace_s)
    finally:
        sweep(child, leave_s)
    return KILLED - child.returncode if child.returncode < 0 else child.returncode


def find_prctl() -> Callable[[int, int], object]:
    """Linux's prctl(2), or something that does nothing where there is none."""
    try:
        return ctypes.CDLL(None).prctl
    except (AttributeError, OSError):
        return lambda option, value: None


def cut(number: int, frame: FrameType | None) -> None:
    raise LifelineCut


def wait_with_lifeline(child: subprocess.Popen[bytes]) -> None:
    """Return when the child has ended; raise LifelineCut when standard input has."""
    try:
        ended, pause_s = [os.pidfd_open(child.pid)], None
    except (AttributeError, OSError):
        # no such call here: look at the child from time to time instead
        ended, pause_s = [], 0.2
    while child.poll() is None:
        readable, _, _ = select.select([0, *ended], [], [], pause_s)
        # os.read and not sys.stdin: a buffered read holds a lock that makes Python abort at exit.
        if 0 in readable and os.read(0, 1) == b"":
            raise LifelineCut


def end_group(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask the child's group to end, and insist after `grace_s`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, SWEEP_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
            return


def sweep(child: subprocess.Popen[bytes], leave_s: float) -> None:
    """Kill whatever descends from this process, once `leave_s` is over; as a subreaper it is
    given every orphan.
    """
    now = time.monotonic()
    patience, limit = now + leave_s, now + leave_s + SWEEP_S
    while (alive := list(descendants(os.getpid()))) and time.monotonic() < limit:
        for pid in alive if time.monotonic() >= patience else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap(child)
        time.sleep(0.02)


def reap(child: subprocess.Popen[bytes]) -> None:
    child.poll()  # its status is asked for here, where it is kept, before waitpid can take it away
    with contextlib.suppress(ChildProcessError):
        while child.returncode is not None and os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants(root: int) -> Iterator[int]:
    """Living processes below `root`; none where there is no /proc."""
    below: dict[int, list[int]] = {}
    for pid, parent in living_processes():
        below.setdefault(parent, []).append(pid)
    todo = [root]
    while todo:
        children = below.get(todo.pop(), [])
        todo += children
        yield from children


def living_processes() -> Iterator[tuple[int, int]]:
    """(process, its parent) of everything that runs here, zombies left out."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # the name before ")" may hold anything
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                yield int(stat.parent.name), int(parent)


def kill_marked(variable: str) -> None:
    """Kill every process that has `NAME=value` in its environment: what is left of a child
    whose guard was killed itself.
    """
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in environment.read_bytes().split(b"\0"):
                os.kill(int(environment.parent.name), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
