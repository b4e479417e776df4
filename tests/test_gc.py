"""What is an orphan, what is not yet one, and what never is."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from deepspec import gc
from deepspec.store import Store

HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def put(store: Store, name: str, *, age_s: float = 48 * HOUR) -> str:
    store.write(name, b"data")
    then = time.time() - age_s
    os.utime(store.path(name), (then, then))
    return name


def record(store: Store, shard: int, file: str) -> None:
    store.write(f"hidden/tiny-0/records/{shard:05d}.json", json.dumps({"shard": shard, "file": file}).encode())


def paths(found: list[gc.Orphan]) -> list[str]:
    return sorted(orphan.path for orphan in found)


def test_a_file_that_no_record_names_is_an_orphan_after_the_grace_period(store: Store):
    kept = [put(store, "hidden/tiny-0/shards/00000-a.arrow"), put(store, "hidden/tiny-0/rows/00000-a.arrow")]
    lost = [put(store, "hidden/tiny-0/shards/00000-b.arrow"), put(store, "hidden/tiny-0/rows/00000-b.arrow")]
    young = put(store, "hidden/tiny-0/shards/00001-c.arrow", age_s=HOUR)
    record(store, 0, "shards/00000-a.arrow")
    found = gc.orphans(store)
    assert paths(found) == sorted(lost) and {orphan.kind for orphan in found} == {"shard"}
    assert paths(gc.orphans(store, grace_s=HOUR / 2)) == sorted([*lost, young])
    assert gc.remove(store, found) == 8
    assert [store.exists(name) for name in [*kept, *lost, young]] == [True, True, False, False, True]
    assert gc.orphans(store) == []


def test_a_commit_between_the_listing_and_the_reading_of_records_is_safe(store: Store, monkeypatch: pytest.MonkeyPatch):
    """The data file is listed, then its worker (asleep for two days) writes the record: the file has a name by then."""
    name = put(store, "hidden/tiny-0/shards/00003-a.arrow")
    read_many, committed = store.read_many, []

    def commit_first(folder: str, names=store.names) -> list[str]:
        if folder.endswith("/records") and not committed:
            committed.append(record(store, 3, "shards/00003-a.arrow"))
        return names(folder)

    monkeypatch.setattr(store, "names", commit_first)
    assert gc.orphans(store) == [] and committed and store.exists(name) and read_many


def test_staged_files_stay_while_their_process_lives(store: Store):
    host = os.uname().nodename
    with subprocess.Popen(["true"]) as ended:
        pass
    mine, gone, elsewhere = f".staged/{host}-{os.getpid()}-aa", f".staged/{host}-{ended.pid}-bb", ".staged/other-host-1-cc"
    for name in (mine, gone, elsewhere):
        put(store, name)
    young = put(store, ".staged/other-host-1-dd", age_s=HOUR)
    found = gc.orphans(store)
    assert paths(found) == sorted([gone, elsewhere])
    gc.remove(store, found)
    assert store.exists(mine) and store.exists(young) and not store.exists(gone)


def test_what_is_staged_for_a_remote_store_is_found_in_the_scratch_folder(tmp_path: Path):
    store = Store("memory://gc-scratch", scratch=str(tmp_path))
    store.spool.mkdir()
    left = store.spool / "other-host-1-aa"
    left.write_bytes(b"data")
    os.utime(left, (0, 0))
    found = gc.orphans(store)
    assert paths(found) == [str(left)]
    gc.remove(store, found)
    assert not left.exists()


def test_quarantined_files_go_after_the_grace_period_wherever_they_are(store: Store):
    old = [put(store, "quarantine/x"), put(store, "hidden/tiny-0/quarantine/00000-a.arrow")]
    put(store, "hidden/tiny-0/quarantine/00001-b.arrow", age_s=HOUR)
    found = gc.orphans(store)
    assert paths(found) == sorted(old) and {orphan.kind for orphan in found} == {"quarantine"}


def test_a_record_that_cannot_be_read_stops_the_collection_of_its_artifact(store: Store):
    """Which file it stood for is not known: nothing of that artifact is taken away, the rest is."""
    put(store, "hidden/tiny-0/shards/00000-a.arrow")
    other = put(store, "answers/tiny-0/shards/00000-a.arrow")
    store.write("hidden/tiny-0/records/00000.json", b"{broken")
    assert paths(gc.orphans(store)) == [other]


def test_ten_thousand_shards_take_seconds(store: Store):
    shards, records = Path(store.path("hidden/tiny-0/shards")), Path(store.path("hidden/tiny-0/records"))
    shards.mkdir(parents=True)
    records.mkdir()
    for shard in range(10_000):
        (shards / f"{shard:05d}-a.arrow").touch()
        (records / f"{shard:05d}.json").write_text(json.dumps({"file": f"shards/{shard:05d}-a.arrow"}))
    (shards / "00007-b.arrow").touch()
    started = time.monotonic()
    assert paths(gc.orphans(store, grace_s=-60)) == ["hidden/tiny-0/shards/00007-b.arrow"]
    assert time.monotonic() - started < 10
