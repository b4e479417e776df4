"""Local copies of ranges of remote files: bounded, shared by all processes of a machine, safe to
lose at any moment.

A remote shard is a sparse local file plus a list of the ranges that it holds: a sample brings in
its own bytes and not the gigabytes around it, so several nodes that share an epoch fetch nothing
twice. The shards used longest ago go first.

No lock is held while reading or writing. Whoever reads checks the bytes against the index anyway,
so the worst that a race (or a power cut) leaves behind is a range that is listed and wrong, which
is fetched again.
"""

import contextlib
import fcntl
import os
from pathlib import Path

import numpy as np
import xxhash

RANGE = np.dtype([("offset", "<u8"), ("num_bytes", "<u8")])
KEPT = 0.9  # share of the limit that is left after clearing
LOOKS_PER_LIMIT = 100  # the folder is measured each time that a hundredth of the limit was written


class LocalCopies:
    """Copies in a folder, at most `max_bytes` of them."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.max_bytes = folder, max_bytes
        self._since_look = max_bytes  # the first write measures

    def get(self, key: str, offset: int, num_bytes: int) -> np.ndarray | None:
        """The bytes if they were put here, unchecked; None where they are not."""
        data, ranges = self._paths(key)
        try:
            held = np.fromfile(ranges, dtype=RANGE)
            if not ((held["offset"] == offset) & (held["num_bytes"] == num_bytes)).any():
                return None
            found = np.fromfile(data, np.uint8, num_bytes, offset=offset)
            os.utime(ranges)  # used now: goes last
        except FileNotFoundError:
            return None
        return found if len(found) == num_bytes else None

    def put(self, key: str, offset: int, message: memoryview) -> None:
        """Keep the bytes; a full or failing disk only means that they are not kept."""
        data, ranges = self._paths(key)
        entry = np.array([(offset, len(message))], dtype=RANGE).tobytes()
        with contextlib.suppress(OSError):
            fd = os.open(data, os.O_CREAT | os.O_WRONLY, 0o644)
            with os.fdopen(fd, "wb", buffering=0) as file:
                os.pwrite(file.fileno(), message, offset)
            with ranges.open("ab", buffering=0) as file:
                file.write(entry)  # so few bytes are appended at once or not at all
        self._since_look += len(message)
        if self._since_look > self.max_bytes // LOOKS_PER_LIMIT:
            self._since_look = 0
            self._make_room()

    def num_bytes(self) -> int:
        """What the copies take on the disk now."""
        return sum(_disk_bytes(path) for path in self.folder.glob("*.data"))

    def _paths(self, key: str) -> tuple[Path, Path]:
        name = xxhash.xxh3_128_hexdigest(key.encode())
        return self.folder / f"{name}.data", self.folder / f"{name}.ranges"

    def _make_room(self) -> None:
        """Remove the shards used longest ago until a tenth of the limit is free; one process at
        a time does it.
        """
        with (self.folder / "lock").open("wb") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            total = self.num_bytes()
            if total <= self.max_bytes:
                return
            # Not by the lists: a process killed between its two files leaves bytes that no list
            # names, and they take room, too.
            for data in sorted(self.folder.glob("*.data"), key=_last_used):
                total -= _disk_bytes(data)
                # first: what is listed should be there
                data.with_suffix(".ranges").unlink(missing_ok=True)
                data.unlink(missing_ok=True)
                if total <= KEPT * self.max_bytes:
                    return


def _disk_bytes(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_blocks * 512
    return 0


def _last_used(data: Path) -> float:
    """When its list was last read or written; before everything else for bytes without a list,
    which nobody can read.
    """
    with contextlib.suppress(FileNotFoundError):
        return data.with_suffix(".ranges").stat().st_mtime
    return 0.0
