"""Processes of one test, however many tests run beside it: found by what they inherited, not by
their names.
"""

import contextlib

import psutil


def marked(name: str, value: str, words: str = "") -> list[psutil.Process]:
    """Living processes with `name=value` in the environment they were started with, and `words`
    in their command.
    """
    return [
        one for one in psutil.process_iter() if has(one, name, value) and words in command_of(one)
    ]


def has(process: psutil.Process, name: str, value: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return is_alive(process) and process.environ().get(name) == value
    return False


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs still; the dead that nobody has asked about (zombies) do not."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
