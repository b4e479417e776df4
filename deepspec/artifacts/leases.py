"""Leases: which shards a run works on, kept in the store, so that two runs on one artifact do not
make the same shards twice.

Leases save time and protect nothing: the commit rule keeps an artifact whole whatever two runs do.
Each run writes one file of its own and renews it; the file of a run that died counts for nothing
after `LOST_S`. Ages are differences between times that the store gave, so no two clocks are
compared.
"""

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import psutil
from pydantic import ValidationError

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Stored
from deepspec.errors import DeepSpecError
from deepspec.process.shard_ranges import parse_shards, shard_list
from deepspec.storage.store import pretty_json

log = logging.getLogger(__name__)

FOLDER = "claims"  # of the store
RENEW_S = 10.0
LOST_S = 60.0  # without being renewed
ASK_S = 0.2  # between two looks while another run requests the same shards at the same moment
FORGET_S = 3600.0  # after which the file of a run that died is removed


class Lease(Stored):
    """What a run publishes about the shards that it works on."""

    run: str
    """Its name, for people."""
    run_id: str
    parent_run_id: str = ""
    """The run that assigned it its shards, and holds a lease on them, too; empty where it was
    started on its own.
    """
    process: str
    """As in `this_process`."""
    settled: bool = False
    """Whether the shards are its own, or only requested so far."""
    shards: str = ""


class Acquired(NamedTuple):
    """The outcome of a request for shards."""

    shards: list[int]
    """Those that are this run's now."""
    others: list[Lease]
    """The leases on the rest."""


class OtherLease(NamedTuple):
    """Another run's lease, as it was found in the store."""

    name: str
    lease: Lease
    alive: bool


class Leases:
    """A run's lease on shards of an artifact, renewed by a thread until the block is left."""

    def __init__(self, artifact: Artifact, lease: Lease) -> None:
        self.store, self.folder = artifact.store, f"{FOLDER}/{artifact.folder}"
        self.name, self.lease = f"{uuid.uuid4().hex}.json", lease
        self._written = 0.0
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Self:
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        # Where the file cannot be removed, the lease counts as lost a minute from now.
        with self._lock, contextlib.suppress(DeepSpecError, OSError):
            self.store.remove(f"{self.folder}/{self.name}")

    def acquire(self, wanted: Iterable[int]) -> Acquired:
        """Those of the wanted shards that no other living run works on are this run's now, instead
        of what it had before.

        A run writes its request first and looks at the others then, so of two that request at the
        same moment at least one sees the other; the smaller name goes first.
        """
        mine, others = set(wanted), []
        self._publish(mine, settled=False)
        while True:
            rivals = [
                (other, both)
                for other in self.others()
                if other.alive and not self._is_parent(other.lease)
                if (both := mine.intersection(parse_shards(other.lease.shards)))
            ]
            lost = [
                (other.lease, both)
                for other, both in rivals
                if other.lease.settled or other.name < self.name
            ]
            if lost:
                others += [lease for lease, _ in lost]
                mine -= set().union(*(both for _, both in lost))
                self._publish(mine, settled=False)
            if not any(both & mine for _, both in rivals):
                break
            time.sleep(ASK_S)
        self._publish(mine, settled=True)
        return Acquired(sorted(mine), others)

    def release(self) -> None:
        """The run keeps its file, and no shard."""
        self._publish((), settled=True)

    def others(self) -> list[OtherLease]:
        """The leases of all other runs on the artifact."""
        entries = {entry.name: entry for entry in self.store.entries(self.folder)}
        own = entries.pop(self.name, None)
        now = own.modified + time.monotonic() - self._written if own else 0.0
        contents = self.store.read_many([f"{self.folder}/{name}" for name in entries])
        found = []
        for name, data in zip(entries, contents, strict=True):
            with contextlib.suppress(ValidationError):  # gone since the listing, or no lease
                lease, age_s = Lease.model_validate_json(data or b""), now - entries[name].modified
                alive = age_s < LOST_S and not has_ended(lease.process)
                found.append(OtherLease(name, lease, alive))
                if age_s > FORGET_S:
                    self.store.remove(f"{self.folder}/{name}")
        return found

    def _is_parent(self, lease: Lease) -> bool:
        """Only the parent's lease is no obstacle: a run that is started again may meet what its
        first try left running.
        """
        return bool(self.lease.parent_run_id) and lease.run_id == self.lease.parent_run_id

    def _publish(self, shards: Iterable[int], *, settled: bool) -> None:
        fields = {"shards": shard_list(shards), "settled": settled}
        self.lease = self.lease.model_copy(update=fields)
        self._write()

    def _write(self) -> None:
        with self._lock:
            if not self._left.is_set():
                self.store.write(f"{self.folder}/{self.name}", pretty_json(self.lease.model_dump()))
                self._written = time.monotonic()

    def _renew(self) -> None:
        while not self._left.wait(RENEW_S):
            try:
                self._write()
            except (DeepSpecError, OSError) as error:
                log.warning("lease=%s was not renewed: %s", self.name, error)


def this_process() -> str:
    """Identifies this process among those of all machines and all times; empty where the system
    does not give enough for that.
    """
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = Path("/proc/self/ns/pid").readlink()
        return f"{os.uname().nodename} {boot} {space} {os.getpid()} {_started(os.getpid())}"
    return ""


def has_ended(process: str) -> bool:
    """Whether it can be seen from here that the process runs no more: on this machine, not on
    another one.
    """
    *place, pid, started = process.split() or ["", "", ""]
    if not place or place != this_process().split()[:-2]:
        return False
    return not psutil.pid_exists(int(pid)) or _started(int(pid)) not in ("", started)


def _started(pid: int) -> str:
    """When the process was started, in ticks since the machine was; empty if it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def holders_text(leases: Sequence[Lease]) -> str:
    """The runs that hold these leases: `run 'pipeline demo' on node1`."""
    runs = [
        f"run {lease.run!r} on {lease.process.partition(' ')[0] or 'another machine'}"
        for lease in leases
    ]
    return ", ".join(dict.fromkeys(runs))
