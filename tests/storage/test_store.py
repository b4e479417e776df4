"""The store on the local disk (and in memory): whole or not there, one winner, nothing outside."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepspec.errors import DamagedData, StoreError
from deepspec.storage.store import Store, file_checksum
from deepspec.storage.urls import open_store

CONTEXT = multiprocessing.get_context("spawn")


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    url = (
        str(tmp_path / "store")
        if request.param == "disk"
        else f"memory://{tmp_path.name}{time.time_ns()}"
    )
    return open_store(url, scratch=str(tmp_path / "scratch"))


def test_what_was_written_is_read_listed_and_removed(store: Store):
    store.write("a/one", b"1")
    store.write("a/b/two", b"22")
    store.write("a/one", b"one")
    assert (store.read("a/one"), store.size("a/b/two"), store.exists("a"), store.exists("x")) == (
        b"one",
        2,
        True,
        False,
    )
    assert store.read_many(["a/b/two", "x", "a/one"]) == [b"22", None, b"one"]
    assert (store.names("a"), store.names("x"), [entry.name for entry in store.entries("a")]) == (
        ["b", "one"],
        [],
        ["one"],
    )
    assert (
        abs(store.entries("a")[0].modified - time.time()) < 60
        and store.entries("a")[0].num_bytes == 3
    )
    store.remove("a")
    store.remove("never/there")
    assert not store.exists("a/one") and store.names("a") == []
    with pytest.raises(FileNotFoundError):
        store.read("a/one")


def test_a_range_is_exact_or_an_error(store: Store):
    store.write("data", b"0123456789")
    assert (
        bytes(store.read_range("data", 2, 6)) == b"2345"
        and bytes(store.read_range("data", 4, 4)) == b""
    )
    with pytest.raises(DamagedData, match="ends before"):
        store.read_range("data", 8, 11)


def test_a_published_file_is_moved_and_a_staged_one_never_stays(store: Store):
    with store.staged() as local:
        local.write_bytes(b"data")
        store.publish(local, "shards/0", checksum=file_checksum(local))
    with store.staged() as local:
        local.write_bytes(b"abandoned")
    assert store.fetch("shards/0").read_bytes() == b"data"
    assert list(store.spool.iterdir()) == []


def test_a_fetched_copy_is_that_of_now_and_of_its_checksum(tmp_path: Path):
    store = open_store(f"memory://{tmp_path.name}fetch", scratch=str(tmp_path))
    for data in (b"first", b"other"):
        store.write("index", data)
        assert store.fetch("index").read_bytes() == data
    with pytest.raises(DamagedData, match="its checksum is"):
        store.fetch("index", "0" * 32)


def test_no_path_leads_outside(store: Store):
    for path in ("../x", "/etc/passwd", "a/../../x"):
        for call in (store.read, store.exists, store.remove, store.names, store.path):
            with pytest.raises(DamagedData, match="outside the store"):
                call(path)


def test_of_sixteen_racing_threads_exactly_one_creates(store: Store):
    with ThreadPoolExecutor(16) as pool:
        for number in range(20):
            assert (
                sum(
                    pool.map(
                        lambda _, n=number: store.write_new(f"records/{n}", b"equal"), range(16)
                    )
                )
                == 1
            )


def race(store: Store, barrier, results) -> None:
    for number in range(20):
        barrier.wait()
        results.put((number, store.write_new(f"race/{number}", b"%d" % os.getpid())))


def test_of_sixteen_racing_processes_exactly_one_creates(tmp_path: Path):
    # sixteen interpreters would take longer than the race
    context = multiprocessing.get_context("fork")
    store, barrier, results = open_store(str(tmp_path)), context.Barrier(16), context.Queue()
    racers = [context.Process(target=race, args=(store, barrier, results)) for _ in range(16)]
    for racer in racers:
        racer.start()
    found = [results.get(timeout=60) for _ in range(16 * 20)]
    for racer in racers:
        racer.join()
    assert sorted(number for number, won in found if won) == list(range(20))
    assert list(store.spool.iterdir()) == []


CRASH = """
import os, sys
from deepspec.storage.store import Store
from deepspec.storage.urls import open_store
store = open_store(sys.argv[1])
os.link = os.replace = lambda *_: os._exit(9)
type(store.spool).replace = lambda *_: os._exit(9)
getattr(store, sys.argv[2])("record", b"x" * 1000)
"""


@pytest.mark.parametrize("write", ["write", "write_new"])
def test_a_writer_that_dies_before_the_last_step_leaves_nothing_visible(write: str, tmp_path: Path):
    assert (
        subprocess.run([sys.executable, "-c", CRASH, str(tmp_path), write], check=False).returncode
        == 9
    )
    store = open_store(str(tmp_path))
    assert not store.exists("record") and store.names("") == [".staged"]


def test_a_store_may_be_sent_to_other_processes(tmp_path: Path):
    remote = open_store(f"memory://{tmp_path.name}", scratch=str(tmp_path), uploads="size_only")
    again = pickle.loads(pickle.dumps(remote))
    assert (again.url, again.scratch, again.uploads) == (remote.url, remote.scratch, "size_only")
    store = open_store(str(tmp_path))
    store.write("data", b"x")
    with CONTEXT.Pool(1) as pool:
        assert pool.apply(store.read, ("data",)) == b"x"


def test_what_keeps_one_from_writing_is_said_before_the_work(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        open_store(str(tmp_path / "file" / "store")).check_writable()
    with pytest.raises(StoreError, match="GB are free"):
        open_store(str(tmp_path)).check_writable(min_free_gb=1e9)
    open_store(str(tmp_path / "new")).check_writable()
    assert open_store(str(tmp_path / "new")).names("") == [".staged"]


def test_a_local_store_loads_no_s3_client(tmp_path: Path):
    script = (
        "import sys; from deepspec.storage.urls import open_store; "
        "open_store(sys.argv[1]).check_writable(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert not {"s3fs", "obstore", "botocore", "aiohttp", "torch", "prefect"} & set(
        done.stdout.split()
    )
