"""Runs a command that must never outlive its parent.

`python -m deepspec.process.supervisor GRACE_S COMMAND ...`

Standard input is a lifeline: the parent holds its other end, so end of file means that the parent
closed it or died, in whatever way. All that it writes is another GRACE_S, one a line. At the end of
file, and also when the command has ended, no descendant is left behind; not even torchrun's ranks,
each of which lives in a session of its own where killing a process group does not reach it.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

import psutil

KILLED = 128  # exit status of a command that died of signal n: KILLED + n, as in a shell
# what a helper process may take to notice that its parent has ended (multiprocessing's resource
# tracker)
LEAVE_S = 1.0
SWEEP_S = 10.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class LifelineCut(Exception):
    """The parent is gone, or has the command end."""


class Lifeline:
    """What the parent holds, and the seconds between SIGTERM and SIGKILL that it grants."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s, self._begun = grace_s, b""

    def read(self) -> None:
        """Take what the parent wrote.

        Raises:
            LifelineCut: the parent closed it.
        """
        # os.read and not sys.stdin: a buffered read holds a lock that makes Python abort at exit.
        data = os.read(0, 4096)
        if not data:
            raise LifelineCut
        *lines, self._begun = (self._begun + data).split(b"\n")
        if lines:
            self.grace_s = float(lines[-1])


def supervise(grace_s: float, command: list[str]) -> int:
    """Exit status of the command; all its descendants are gone."""
    prctl = find_prctl()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, cut)
    supervisor = os.getpid()

    def die_with_supervisor() -> None:
        # SIGTERM and not SIGKILL: torchrun ends its ranks on SIGTERM, and leaves them behind when
        # it is killed.
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != supervisor:
            os._exit(KILLED + signal.SIGTERM)

    # Only this thread exists here, so running Python between fork and exec is safe.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_supervisor
    )
    leave_s, lifeline = LEAVE_S, Lifeline(grace_s)
    try:
        wait_with_lifeline(child, lifeline)
    except LifelineCut:
        leave_s = 0.0
        end_group(child, lifeline.grace_s)
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
    """The handler of SIGTERM: as if the lifeline were cut."""
    raise LifelineCut


def wait_with_lifeline(child: subprocess.Popen[bytes], lifeline: Lifeline) -> None:
    """Return when the child has ended; raise LifelineCut when standard input has."""
    try:
        ended, pause_s = [os.pidfd_open(child.pid)], None
    except (AttributeError, OSError):
        # no such call on this system: look at the child from time to time instead
        ended, pause_s = [], 0.2
    while child.poll() is None:
        readable, _, _ = select.select([0, *ended], [], [], pause_s)
        if 0 in readable:
            lifeline.read()


def end_group(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """Send the child's group SIGTERM, and SIGKILL after `grace_s`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, SWEEP_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience_s)
            return


def sweep(child: subprocess.Popen[bytes], leave_s: float) -> None:
    """Kill whatever descends from this process, once `leave_s` is over.

    As a subreaper it becomes the parent of every orphan.
    """
    now = time.monotonic()
    patience, limit = now + leave_s, now + leave_s + SWEEP_S
    while (alive := living_descendants()) and time.monotonic() < limit:
        for process in alive if time.monotonic() >= patience else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        reap(child)
        time.sleep(0.02)


def reap(child: subprocess.Popen[bytes]) -> None:
    """No process that has ended is left as a zombie of this one."""
    child.poll()  # its status is kept here, before waitpid can take it away
    with contextlib.suppress(ChildProcessError):
        while child.returncode is not None and os.waitpid(-1, os.WNOHANG)[0]:
            pass


def living_descendants() -> list[psutil.Process]:
    """The processes below this one that still run: zombies do not."""
    return [process for process in psutil.Process().children(recursive=True) if is_alive(process)]


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs, and is no zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def kill_marked(name: str, value: str) -> None:
    """Kill every process with this environment variable.

    That is what is left of a child whose supervisor was killed itself.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value:
                process.kill()


if __name__ == "__main__":
    sys.exit(supervise(float(sys.argv[1]), sys.argv[2:]))
