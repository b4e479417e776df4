"""Which shards a run works on, said in the store, so that two runs on one artifact do not make the
same ones twice.

Only time depends on it: the commit rule keeps an artifact whole whatever two runs do. Each run
writes one file of its own under `claims/` and renews it; what is left of a run that died counts for
nothing after `LOST_S`. Ages are differences between times that the store gave, so no two clocks are
compared.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import ValidationError

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Stored
from deepspec.errors import DeepSpecError
from deepspec.process.shard_ranges import parse_shards, shard_list
from deepspec.storage.store import pretty_json

log = logging.getLogger(__name__)

RENEW_S = 10.0
LOST_S = 60.0  # without being renewed
ASK_S = 0.2  # between two looks while another run is asking for the same shards at the same moment
FORGET_S = 3600.0  # after which the file of a run that died is taken away


class Claim(Stored):
    """A run's word on what it works on."""

    run: str
    """What people call it."""
    run_id: str
    dealer: str = ""
    """The `run_id` of the run that dealt it its shards, and claims them, too; empty where it
    was started for itself.
    """
    process: str
    """As in `this_process`."""
    settled: bool = False
    """Whether the shards are its own, or only asked for so far."""
    shards: str = ""


class Taken(NamedTuple):
    shards: list[int]
    """What is this run's now."""
    others: list[Claim]
    """Who has the rest."""


class Seen(NamedTuple):
    name: str
    claim: Claim
    alive: bool


class Claims:
    """A run's claim on shards of an artifact, renewed by a thread until the block is left."""

    def __init__(self, artifact: Artifact, claim: Claim) -> None:
        self.store, self.folder = artifact.store, f"claims/{artifact.folder}"
        self.name, self.claim = f"{uuid.uuid4().hex}.json", claim
        self._written, self._lock, self._left = 0.0, threading.Lock(), threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Self:
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        # or it counts as dead a minute from now
        with self._lock, contextlib.suppress(DeepSpecError, OSError):
            self.store.remove(f"{self.folder}/{self.name}")

    def take(self, wanted: Iterable[int]) -> Taken:
        """Those of the wanted shards that no other living run works on are this run's now, instead
        of what it had before.

        A run asks first and looks then, so of two that ask at the same moment at least one sees the
        other; the smaller name goes first.
        """
        mine, others = set(wanted), list[Claim]()
        self._say(mine, settled=False)
        while True:
            rivals = [
                (seen, set(parse_shards(seen.claim.shards)) & mine)
                for seen in self.look()
                if seen.alive and not self._is_dealer(seen)
            ]
            lost = [
                (seen, both)
                for seen, both in rivals
                if both and (seen.claim.settled or seen.name < self.name)
            ]
            if lost:
                others += [seen.claim for seen, _ in lost]
                mine -= set().union(*(both for _, both in lost))
                self._say(mine, settled=False)
            if not any(both & mine for _, both in rivals):
                break
            time.sleep(ASK_S)
        self._say(mine, settled=True)
        return Taken(sorted(mine), others)

    def release(self) -> None:
        self._say((), settled=True)

    def look(self) -> list[Seen]:
        """What all runs at the artifact say, this one left out."""
        entries = {entry.name: entry for entry in self.store.entries(self.folder)}
        own = entries.pop(self.name, None)
        now = own.modified + time.monotonic() - self._written if own else 0.0
        seen = []
        for name, data in zip(
            entries,
            self.store.read_many([f"{self.folder}/{name}" for name in entries]),
            strict=True,
        ):
            with contextlib.suppress(ValidationError):  # gone since the listing, or no claim
                claim, age_s = Claim.model_validate_json(data or b""), now - entries[name].modified
                seen.append(Seen(name, claim, age_s < LOST_S and not has_ended(claim.process)))
                if age_s > FORGET_S:
                    self.store.remove(f"{self.folder}/{name}")
        return seen

    def _is_dealer(self, seen: Seen) -> bool:
        """Nobody else is let through: a run that is begun again may meet what its first try
        left running.
        """
        return bool(self.claim.dealer) and seen.claim.run_id == self.claim.dealer

    def _say(self, shards: Iterable[int], *, settled: bool) -> None:
        self.claim = self.claim.model_copy(
            update={"shards": shard_list(sorted(shards)), "settled": settled}
        )
        self._write()

    def _write(self) -> None:
        with self._lock:
            if not self._left.is_set():
                self.store.write(f"{self.folder}/{self.name}", pretty_json(self.claim.model_dump()))
                self._written = time.monotonic()

    def _renew(self) -> None:
        while not self._left.wait(RENEW_S):
            try:
                self._write()
            except (DeepSpecError, OSError) as error:
                log.warning("claim=%s was not renewed: %s", self.name, error)


def this_process() -> str:
    """Names this process among those of all machines and all times; empty where the system does
    not tell enough.
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
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's
        pass
    return _started(int(pid)) not in ("", started)


def _started(pid: int) -> str:
    """When the process was started, in ticks since the machine was; empty if it cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]


def words(others: Sequence[Claim]) -> str:
    """Who they are: `run 'pipeline demo' on node1`."""
    return ", ".join(
        dict.fromkeys(
            f"run {claim.run!r} on {claim.process.partition(' ')[0] or 'another machine'}"
            for claim in others
        )
    )
