"""What is an orphan, what is not yet one, and what never is."""

import json
import os
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from deepspec.artifacts import gc
from deepspec.storage.store import Entry, Store
from deepspec.storage.urls import open_store

HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def put(store: Store, name: str, *, age_s: float = 48 * HOUR) -> str:
    store.write(name, b"data")
    then = time.time() - age_s
    os.utime(store.path(name), (then, then))
    return name


def record(store: Store, shard: int, file: str) -> None:
    store.write(
        f"hidden/tiny-0/records/{shard:05d}.json",
        json.dumps({"shard": shard, "file": file}).encode(),
    )


def paths(found: list[gc.Orphan]) -> list[str]:
    return sorted(orphan.path for orphan in found)


def test_a_file_that_no_record_names_is_an_orphan_after_the_grace_period(store: Store):
    kept = [
        put(store, "hidden/tiny-0/shards/00000-a.arrow"),
        put(store, "hidden/tiny-0/rows/00000-a.arrow"),
    ]
    lost = [
        put(store, "hidden/tiny-0/shards/00000-b.arrow"),
        put(store, "hidden/tiny-0/rows/00000-b.arrow"),
    ]
    young = put(store, "hidden/tiny-0/shards/00001-c.arrow", age_s=HOUR)
    record(store, 0, "shards/00000-a.arrow")
    os.utime(store.path("hidden/tiny-0/records/00000.json"), (0, 0))
    found = gc.orphans(store)
    assert paths(found) == sorted(lost) and {orphan.kind for orphan in found} == {"shard"}
    assert paths(gc.orphans(store, grace_s=HOUR / 2)) == sorted([*lost, young])
    assert gc.remove(store, found) == 8
    assert [store.exists(name) for name in [*kept, *lost, young]] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert gc.orphans(store) == []


def test_a_commit_between_the_listing_and_the_reading_of_records_is_safe(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """The data file is listed, then its worker (asleep for two days) writes the record: the
    file has a name by then.
    """
    name = put(store, "hidden/tiny-0/shards/00003-a.arrow")
    committed = []

    def commit_first(folder: str, entries=store.entries) -> list[Entry]:
        if folder.endswith("/records") and not committed:
            committed.append(record(store, 3, "shards/00003-a.arrow"))
        return entries(folder)

    monkeypatch.setattr(store, "entries", commit_first)
    assert gc.orphans(store, grace_s=-60) == [] and committed and store.exists(name)


@pytest.fixture(params=["local", "remote"])
def either(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Store:
    monkeypatch.setattr(gc, "RELIST_S", -1.0)  # every listing is too old
    urls = {"local": str(tmp_path / "either"), "remote": f"memory://gc-{uuid.uuid4().hex}"}
    return open_store(urls[request.param], scratch=str(tmp_path / "scratch"))


def test_a_file_that_was_committed_after_it_was_found_is_kept(either: Store):
    """A capture that is run again makes the same bytes, so the same name: what was an orphan
    has a record by the time it would go.
    """
    live = ["hidden/tiny-0/shards/00000-a.arrow", "hidden/tiny-0/rows/00000-a.arrow"]
    lost = "hidden/tiny-0/shards/00001-b.arrow"
    for name in [*live, lost]:
        either.write(name, b"data")
    found = gc.orphans(either, grace_s=-60)
    assert paths(found) == sorted([*live, lost])
    record(either, 0, "shards/00000-a.arrow")
    assert gc.remove(either, found) == 4
    assert [either.exists(name) for name in [*live, lost]] == [True, True, False]


def test_a_file_whose_record_became_unreadable_after_it_was_found_is_kept(either: Store):
    either.write("hidden/tiny-0/shards/00000-a.arrow", b"data")
    found = gc.orphans(either, grace_s=-60)
    either.write("hidden/tiny-0/records/00000.json", b"{broken")
    assert gc.remove(either, found) == 0 and either.exists("hidden/tiny-0/shards/00000-a.arrow")


def test_a_file_that_was_written_again_after_it_was_found_is_kept(either: Store):
    """The same bytes came back and their record is yet to be written: the file is young again."""
    name = "hidden/tiny-0/shards/00000-a.arrow"
    either.write(name, b"data")
    time.sleep(0.3)
    found = gc.orphans(either, grace_s=0.3)
    assert paths(found) == [name]
    either.write(name, b"data")
    assert gc.remove(either, found) == 0 and either.exists(name)
    either.remove(name)
    assert gc.remove(either, found) == 0  # gone since is not an error


def test_the_old_file_of_a_shard_made_again_ages_from_the_new_record(store: Store):
    """A trainer that opened the manifest before the shard was made again still reads the old
    file, however old that is.
    """
    old = put(store, "hidden/tiny-0/shards/00000-a.arrow")
    put(store, "hidden/tiny-0/shards/00000-b.arrow", age_s=0)
    record(store, 0, "shards/00000-b.arrow")
    assert gc.orphans(store) == []
    then = time.time() - 25 * HOUR
    os.utime(store.path("hidden/tiny-0/records/00000.json"), (then, then))
    found = gc.orphans(store)
    assert paths(found) == [old] and found[0].age_s == pytest.approx(25 * HOUR, abs=60)


def test_a_remote_folder_is_not_listed_again_for_each_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = open_store(f"memory://gc-{uuid.uuid4().hex}", scratch=str(tmp_path))
    folders = ["hidden/tiny-0/rows", "hidden/tiny-0/shards"]
    for shard in range(20):
        for folder in folders:
            store.write(f"{folder}/{shard:05d}-a.arrow", b"data")
    found, listed = gc.orphans(store, grace_s=-60), []
    monkeypatch.setattr(gc, "RELIST_S", 60.0)
    monkeypatch.setattr(
        store, "entries", lambda name, entries=store.entries: listed.append(name) or entries(name)
    )
    assert (
        gc.remove(store, found) == 160
        and sorted(listed) == folders
        and gc.orphans(store, grace_s=-60) == []
    )


def test_probes_that_a_killed_check_left_at_the_root_are_found(either: Store):
    either.write(".probe-0123", b"deepspec")
    assert gc.orphans(either) == []
    found = gc.orphans(either, grace_s=-60)
    assert [(orphan.kind, orphan.path) for orphan in found] == [("staged", ".probe-0123")]
    assert gc.remove(either, found) == 8 and not either.exists(".probe-0123")


def test_staged_files_stay_while_their_process_lives(store: Store):
    host = os.uname().nodename
    with subprocess.Popen(["true"]) as ended:
        pass
    mine, gone, elsewhere = (
        f".staged/{host}-{os.getpid()}-aa",
        f".staged/{host}-{ended.pid}-bb",
        ".staged/other-host-1-cc",
    )
    for name in (mine, gone, elsewhere):
        put(store, name)
    young = put(store, ".staged/other-host-1-dd", age_s=HOUR)
    found = gc.orphans(store)
    assert paths(found) == sorted([gone, elsewhere])
    gc.remove(store, found)
    assert store.exists(mine) and store.exists(young) and not store.exists(gone)


def test_what_is_staged_for_a_remote_store_is_found_in_the_scratch_folder(tmp_path: Path):
    store = open_store("memory://gc-scratch", scratch=str(tmp_path))
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


@pytest.mark.timeout(60)  # of which it takes two; a listing for each shard would take more
def test_ten_thousand_shards_are_looked_through_together(store: Store):
    shards, records = (
        Path(store.path("hidden/tiny-0/shards")),
        Path(store.path("hidden/tiny-0/records")),
    )
    shards.mkdir(parents=True)
    records.mkdir()
    for shard in range(10_000):
        (shards / f"{shard:05d}-a.arrow").touch()
        (records / f"{shard:05d}.json").write_text(
            json.dumps({"file": f"shards/{shard:05d}-a.arrow"})
        )
    (shards / "00007-b.arrow").touch()
    assert paths(gc.orphans(store, grace_s=-60)) == ["hidden/tiny-0/shards/00007-b.arrow"]
