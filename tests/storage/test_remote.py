"""The store on a real S3 server (Ceph's gateway on loopback), with both clients; faults the
gateway cannot be asked for by a proxy.
"""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import xxhash

from deepspec.artifacts import gc
from deepspec.errors import EXIT_TRANSIENT, DamagedData, DeepSpecError, StoreError, TransientError
from deepspec.storage import remote, retries
from deepspec.storage.clients import client_of
from deepspec.storage.store import Store, file_checksum
from deepspec.storage.urls import open_store
from tests.faulty import (
    Answer,
    FaultyProxy,
    Request,
    answer,
    cut_body,
    flip_byte,
    lose_answer,
    times,
)
from tests.radosgw import ACCESS_KEY, SECRET_KEY, Radosgw, free_port
from tests.storage.conftest import CLIENTS, PART_BYTES

BIG = os.urandom(PART_BYTES + 1000)  # two parts


def publish(store: Store, name: str, data: bytes) -> None:
    with store.staged() as local:
        local.write_bytes(data)
        store.publish(local, name, checksum=file_checksum(local))


def uploads_of(radosgw: Radosgw, store: Store) -> list[object]:
    return radosgw.client.list_multipart_uploads(Bucket=store.root.split("/")[0]).get("Uploads", [])


def is_part(number: int):
    return lambda request: f"partNumber={number}" in request.path


def is_put(request: Request) -> bool:
    return request.method == "PUT"


def is_get(request: Request) -> bool:
    return request.method == "GET"


def is_completion(request: Request) -> bool:
    return request.method == "POST" and "uploadId" in request.path


@pytest.mark.slow
def test_what_was_written_comes_back_small_empty_and_in_parts(store: Store, radosgw: Radosgw):
    store.write("a/empty", b"")
    store.write("a/small", b"small")
    publish(store, "a/big", BIG)
    publish(store, "a/bigger", BIG * 3)
    assert [store.read(f"a/{name}") for name in ("empty", "small", "big")] == [b"", b"small", BIG]
    assert (store.size("a/big"), store.exists("a/big"), store.exists("a"), store.exists("b")) == (
        len(BIG),
        True,
        True,
        False,
    )
    assert store.read("a/bigger") == BIG * 3
    assert store.read_many(["a/small", "a/none", "a/empty"]) == [b"small", None, b""]
    assert (store.names("a"), store.names(""), store.names("none")) == (
        ["big", "bigger", "empty", "small"],
        ["a"],
        [],
    )
    (entry,) = [entry for entry in store.entries("a") if entry.name == "small"]
    assert entry.num_bytes == 5 and abs(entry.modified - time.time()) < 60
    assert uploads_of(radosgw, store) == [] and not list((store.scratch / "staged").iterdir())
    store.remove("a")
    assert store.names("") == []
    with pytest.raises(FileNotFoundError):
        store.read("a/small")


def test_a_range_is_exact_and_a_range_past_the_end_is_an_error(store: Store):
    store.write("data", bytes(range(200)))
    assert bytes(store.read_range("data", 3, 150)) == bytes(range(3, 150))
    assert bytes(store.read_range("data", 5, 5)) == b""
    for start, end in ((190, 201), (300, 310)):
        with pytest.raises(DamagedData, match="ends before"):
            store.read_range("data", start, end)


def test_of_sixteen_racing_threads_exactly_one_creates_even_with_equal_bytes(store: Store):
    with ThreadPoolExecutor(16) as pool:
        for number in range(3):
            assert (
                sum(
                    pool.map(
                        lambda _, n=number: store.write_new(f"records/{n}", b"equal"), range(16)
                    )
                )
                == 1
            )
    assert store.conditional_writes_work()
    assert store.names("") == ["records"]


def race(store: Store, barrier, results) -> None:
    for number in range(5):
        barrier.wait()
        results.put((number, store.write_new(f"race/{number}", b"%d" % os.getpid())))


def test_of_two_racing_processes_exactly_one_creates(store: Store):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    racers = [context.Process(target=race, args=(store, barrier, results)) for _ in range(2)]
    for racer in racers:
        racer.start()
    found = [results.get(timeout=60) for _ in range(10)]
    for racer in racers:
        racer.join()
    assert sorted(number for number, won in found if won) == list(range(5))


def test_a_fetched_copy_is_never_stale(store: Store):
    first, second = os.urandom(100), os.urandom(100)
    store.write("index.arrow", first)
    assert store.fetch("index.arrow").read_bytes() == first
    store.write("index.arrow", second)
    assert store.fetch("index.arrow").read_bytes() == second
    checksum = xxhash.xxh3_128_hexdigest(second)
    kept = store.fetch("index.arrow", checksum)
    store.remove("index.arrow")
    # without asking the server
    assert store.fetch("index.arrow", checksum) == kept and kept.read_bytes() == second
    store.write("index.arrow", first)
    with pytest.raises(DamagedData, match="its checksum is"):
        store.fetch("index.arrow", xxhash.xxh3_128_hexdigest(b"other"))
    assert [path for path in kept.parent.iterdir() if path.name.startswith(".")] == []


class Load:
    """Readers and writers of small and multipart objects on one store, until `stop`; each
    checks every byte.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.stop = store, threading.Event()
        self.done = {"read": 0, "small": 0, "large": 0}

    def start(self, pool: ThreadPoolExecutor) -> list[Future[None]]:
        publish(self.store, "data", BIG)
        jobs = [pool.submit(self.read, offset) for offset in (0, 1 << 20)]
        return [
            *jobs,
            pool.submit(self.write, "small", b"x" * 1000),
            pool.submit(self.write, "large", BIG),
        ]

    def read(self, offset: int) -> None:
        while not self.stop.is_set():
            assert (
                bytes(self.store.read_range("data", offset, offset + (4 << 20)))
                == BIG[offset : offset + (4 << 20)]
            )
            self.done["read"] += 1

    def write(self, name: str, data: bytes) -> None:
        while not self.stop.is_set():
            path = f"{name}/{self.done[name]}"
            publish(self.store, path, data)
            assert self.store.write_new(f"{path}.json", b"record")
            self.done[name] += 1

    def check(self) -> None:
        for number in range(self.done["large"]):
            assert self.store.read(f"large/{number}") == BIG


@pytest.mark.slow
def test_a_15_second_outage_in_mid_read_and_mid_write_surfaces_nothing(
    s3_url, radosgw, tmp_path: Path, monkeypatch
):
    """`kill -9` of the gateway, restarted after 15 s, under both clients at once."""
    stores = [
        open_store(f"{s3_url}/{client}", scratch=str(tmp_path / client)) for client in CLIENTS
    ]
    loads = [Load(store) for store in stores]

    def client_in_url(url: str, root: str, name=None):
        return client_of(url, root, name=name or url.rpartition("/")[2])

    monkeypatch.setattr(remote, "client_of", client_in_url)
    with ThreadPoolExecutor(8) as pool:
        jobs = [job for load in loads for job in load.start(pool)]
        time.sleep(1)
        radosgw.kill()
        before = [dict(load.done) for load in loads]
        time.sleep(15)
        radosgw.restart()
        deadline = time.monotonic() + 20
        wanted = [
            (load, kind, count + 2)
            for load, counts in zip(loads, before, strict=True)
            for kind, count in counts.items()
        ]
        while time.monotonic() < deadline and any(
            load.done[kind] < count for load, kind, count in wanted
        ):
            time.sleep(0.1)
        for load in loads:
            load.stop.set()
        for job in jobs:
            job.result()
    assert all(load.done[kind] >= count for load, kind, count in wanted)
    for load in loads:
        load.check()


HALFWAY = """
import sys
from pathlib import Path
from deepspec.storage.store import Store
from deepspec.storage.urls import open_store
open_store(sys.argv[1], scratch=sys.argv[2]).publish(Path(sys.argv[3]), "shards/00000-x.arrow")
"""


def test_a_multipart_upload_killed_half_way_shows_nothing_and_gc_aborts_it(
    store: Store, radosgw: Radosgw, proxy: FaultyProxy, tmp_path: Path
):
    (tmp_path / "file").write_bytes(BIG * 2)  # two parts of the size that the child knows
    held = threading.Event()

    def hold(request: Request, forward):
        held.set()
        time.sleep(3)

    proxy.fault = times(1, hold, when=is_part(2))
    arguments = [store.url, str(tmp_path / "scratch"), str(tmp_path / "file")]
    child = subprocess.Popen([sys.executable, "-c", HALFWAY, *arguments])
    assert held.wait(60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(uploads_of(radosgw, store)) == 1
    assert store.names("") == [] and not store.exists("shards/00000-x.arrow")
    assert gc.orphans(store, grace_s=3600) == []
    (orphan,) = gc.orphans(store, grace_s=-60)
    assert (orphan.kind, orphan.path) == ("upload", "shards/00000-x.arrow")
    gc.remove(store, [orphan])
    assert uploads_of(radosgw, store) == []


def test_a_failed_multipart_upload_is_aborted(store: Store, radosgw: Radosgw, proxy: FaultyProxy):
    proxy.fault = times(1, answer(400, "EntityTooSmall"), when=is_part(2))
    with pytest.raises(StoreError, match="refuses the request"):
        publish(store, "data", BIG)
    assert uploads_of(radosgw, store) == [] and store.names("") == []


PASSING = {
    "slow down": answer(503, "SlowDown"),
    "internal error": answer(500, "InternalError"),
    "too many": answer(429, "TooManyRequests"),
    "flipped bit": flip_byte,
    "lost answer": lose_answer,
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_what_may_pass_is_tried_again_and_every_byte_checked_by_the_server(
    fault, store: Store, proxy: FaultyProxy, radosgw: Radosgw
):
    proxy.fault = times(1, fault, when=is_put)
    store.write("small", b"small")
    proxy.fault = times(1, fault, when=is_part(2))
    publish(store, "big", BIG)
    assert (store.read("small"), store.read("big")) == (b"small", BIG)
    assert uploads_of(radosgw, store) == []


def test_a_body_cut_short_is_read_again(store: Store, proxy: FaultyProxy):
    store.write("data", BIG)
    proxy.fault = times(2, cut_body, when=is_get)
    assert bytes(store.read_range("data", 5, 1 << 20)) == BIG[5 : 1 << 20]
    proxy.fault = times(2, cut_body, when=is_get)
    assert store.read("data") == BIG


def test_a_creation_whose_answer_got_lost_is_still_ours(store: Store, proxy: FaultyProxy):
    proxy.fault = times(1, lose_answer, when=is_put)
    assert store.write_new("record", b"one")
    proxy.fault = times(1, lose_answer, when=is_put)
    assert not store.write_new("record", b"one")
    proxy.fault = times(1, answer(409, "ConditionalRequestConflict"), when=is_put)
    assert store.write_new("other", b"two")  # a conflict with something that is gone by now
    assert store.read("other") == b"two"


def test_a_completed_upload_whose_answer_got_lost_is_not_sent_twice(
    store: Store, proxy: FaultyProxy
):
    proxy.fault = times(1, lose_answer, when=is_completion)
    publish(store, "data", BIG)
    assert store.read("data") == BIG
    assert sum("partNumber=1" in request.path for request in proxy.seen) == 1


def test_an_upload_that_arrives_changed_is_replaced_once_then_an_error(
    store: Store, proxy: FaultyProxy
):
    """No signature covers what the server itself loses, so the object is read back."""

    def spoil(request: Request, forward):
        found = forward(request.body)
        return found._replace(body=b"?" + found.body[1:])

    proxy.fault = times(1, spoil, when=is_get)
    publish(store, "data", BIG)
    assert store.read("data") == BIG
    proxy.fault = times(1000, spoil, when=is_get)
    with pytest.raises(DamagedData, match="twice"):
        publish(store, "other", BIG)
    proxy.fault = times(0, spoil, when=is_get)
    assert not store.exists("other")


def test_a_server_that_ignores_the_condition_gets_one_warning(
    store: Store, proxy: FaultyProxy, radosgw: Radosgw, caplog
):
    def ignore(request: Request, forward):
        name, key = request.path.strip("/").split("/", 1)
        radosgw.client.put_object(Bucket=name, Key=key, Body=request.body)
        return Answer(200, [("ETag", '"0"')], b"")

    proxy.fault = times(1000, ignore, when=is_put)
    for _ in range(2):
        store.check_writable()
    assert [record.levelname for record in caplog.records if "If-None-Match" in record.message] == [
        "WARNING"
    ]
    assert store.names("") == []


def refused(store: Store, kind: type[DeepSpecError] = StoreError) -> str:
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        store.check_writable()
    assert time.monotonic() - started < 12
    return str(caught.value)


def test_each_thing_that_keeps_one_from_writing_has_its_message_without_any_secret(
    s3_url, store: Store, client, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(remote, "QUICK_S", 1.5)
    messages = [refused(open_store("s3://no-such-bucket-here/x", scratch=str(tmp_path)))]
    assert "no such bucket" in messages[-1]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-" + SECRET_KEY)
    messages.append(refused(open_store(s3_url, scratch=str(tmp_path))))
    assert "refuses these credentials" in messages[-1]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANOSUCHKEY0000000")
    messages.append(refused(open_store(s3_url, scratch=str(tmp_path))))
    assert "refuses these credentials" in messages[-1]
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    messages.append(refused(open_store(s3_url, scratch=str(tmp_path))))
    assert "no credentials were found" in messages[-1]
    for name, value in {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    messages.append(refused(open_store(s3_url, scratch=str(tmp_path)), TransientError))
    assert "cannot reach the store" in messages[-1] and "check AWS_ENDPOINT_URL" in messages[-1]
    with pytest.raises(StoreError, match="GB are free"):
        open_store("memory://x", scratch=str(tmp_path)).check_writable(min_free_gb=1e9)
    for text in [*messages, caplog.text]:
        assert not [
            word for word in (ACCESS_KEY, SECRET_KEY, "AKIANOSUCH", "Signature=") if word in text
        ]


def test_a_server_that_takes_connections_and_says_nothing_is_given_up_in_time(
    s3_url, tmp_path, monkeypatch
):
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("DEEPSPEC_S3_CLIENT", "s3fs")
        monkeypatch.setattr(remote, "CHECK_S", 2.0)
        assert "no answer in" in refused(open_store(s3_url, scratch=str(tmp_path)), TransientError)


def test_a_server_that_restarts_during_the_first_check_is_worth_another_try(
    s3_url, radosgw, tmp_path, monkeypatch
):
    """Every child of a lane begins with this check: a 15 s restart during one of 313 must not
    fail its group for good.
    """
    monkeypatch.setattr(remote, "QUICK_S", 1.5)
    store = open_store(s3_url, scratch=str(tmp_path))
    radosgw.kill()
    try:
        with pytest.raises(TransientError, match="cannot reach the store") as caught:
            store.check_writable()
    finally:
        radosgw.restart()
    assert caught.value.exit_code == EXIT_TRANSIENT
    store.check_writable()


def test_a_server_that_stays_away_is_a_transient_error(store: Store, monkeypatch):
    monkeypatch.setattr(retries, "TRIES", 3)
    store.write("data", b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TransientError, match="did not answer"):
        open_store(store.url).read("data")


def test_many_small_objects_are_read_in_order(store: Store, client: str):
    num = 40  # the same path as for ten thousand, which take a minute of this server
    names = [f"records/{number:05d}.json" for number in range(num)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.write(name, name.encode()), names))
    assert store.names("records") == [name.split("/")[1] for name in names]
    assert store.read_many(names[::-1]) == [name.encode() for name in names[::-1]]
