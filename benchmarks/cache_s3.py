"""Random ranged reads from a real S3 server (Ceph's gateway on loopback) through the store, against
bare `http.client`.

8 readers in flight, ranges of 6 and 30 MB; each client runs in a process of its own, so that its
CPU seconds are its own. Server and client share the machine, so only ratios within one round mean
something. Goals: throughput at least 0.75 of bare reading; CPU at most 0.6 s/GB (obstore) and 1.0
s/GB (s3fs), said as limit/measured >= 1; a 15 s outage surfaces nothing. Needs Ceph
(tests/radosgw.py says how to install it).
"""

import http.client
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from deepspec.storage.store import file_checksum
from deepspec.storage.urls import open_store
from tests.radosgw import Radosgw, ceph_missing

ROUNDS, READERS, OUTAGE_S = 5, 8, 15.0
OBJECTS, OBJECT_BYTES = 4, 120_000_000
RANGES = {"6 MB": (6_000_000, 64), "30 MB": (30_000_000, 16)}
SIDES = ("raw", "obstore", "s3fs")
CPU_LIMITS = {"obstore": 0.6, "s3fs": 1.0}


class Reading(NamedTuple):
    mb_per_s: float
    cpu_s_per_gb: float


def ranges(size: str, seed: int) -> list[tuple[str, int, int]]:
    num_bytes, count = RANGES[size]
    chance = random.Random(seed)
    starts = [chance.randrange(OBJECT_BYTES - num_bytes) for _ in range(count)]
    return [(f"shard-{chance.randrange(OBJECTS)}", start, start + num_bytes) for start in starts]


def measured(read, wanted: list[tuple[str, int, int]]) -> Reading:
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        num_bytes = sum(pool.map(lambda job: read(*job), wanted))
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    assert num_bytes == sum(end - start for _, start, end in wanted), "a range came short"
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Reading(num_bytes / 1e6 / seconds, cpu_s / (num_bytes / 1e9))


def store_reader(url: str):
    store = open_store(url)
    return lambda name, start, end: len(store.read_range(name, start, end))


def raw_reader(url: str):
    """The limit: presigned URLs, one kept connection and one reused buffer a thread."""
    from botocore.session import Session

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client, local = Session().create_client("s3"), threading.local()
    keys = [f"shard-{number}" for number in range(OBJECTS)]
    urls = {
        key: client.generate_presigned_url(
            "get_object", {"Bucket": bucket, "Key": f"{prefix}/{key}"}
        )
        for key in keys
    }
    largest = max(num_bytes for num_bytes, _ in RANGES.values())

    def read(name: str, start: int, end: int) -> int:
        where = urlsplit(urls[name])
        if not hasattr(local, "connection"):
            local.connection, local.buffer = (
                http.client.HTTPConnection(where.netloc),
                memoryview(bytearray(largest)),
            )
        local.connection.request(
            "GET", f"{where.path}?{where.query}", headers={"Range": f"bytes={start}-{end - 1}"}
        )
        response, done = local.connection.getresponse(), 0
        while got := response.readinto(local.buffer[done : end - start]):
            done += got
        response.read()
        return done

    return read


def side(name: str, url: str) -> None:
    """A process of one side: a line "size seed" in, a reading out."""
    read = raw_reader(url) if name == "raw" else store_reader(url)
    for line in sys.stdin:
        size, seed = line.strip().split("|")
        print(json.dumps(measured(read, ranges(size, int(seed)))), flush=True)


class Side:
    def __init__(self, name: str, url: str) -> None:
        environment = {**os.environ, "DEEPSPEC_S3_CLIENT": "s3fs" if name == "raw" else name}
        command = [sys.executable, "-m", "benchmarks.cache_s3", name, url]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def read(self, size: str, seed: int) -> Reading:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{size}|{seed}\n")
        self.process.stdin.flush()
        return Reading(*json.loads(self.process.stdout.readline()))

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def upload(url: str, scratch: str, client: str) -> float:
    """Megabytes a second of publishing one shard, the reading back included."""
    os.environ["DEEPSPEC_S3_CLIENT"] = client
    store = open_store(url, scratch=scratch)
    seconds = []
    for number in range(OBJECTS):
        with store.staged() as local:
            local.write_bytes(os.urandom(OBJECT_BYTES))
            checksum = file_checksum(local)
            started = time.perf_counter()
            store.publish(local, f"shard-{number}", checksum=checksum)
            seconds.append(time.perf_counter() - started)
    return OBJECT_BYTES / 1e6 / statistics.median(seconds)


def outage(server: Radosgw, url: str, client: str) -> float:
    """The longest that a read took across a `kill -9` and a restart 15 s later; every read is
    whole or this raises.
    """
    os.environ["DEEPSPEC_S3_CLIENT"] = client
    store, longest = open_store(url), [0.0]
    stop = threading.Event()

    def read(seed: int) -> None:
        jobs = ranges("6 MB", seed)
        while not stop.is_set():
            name, start, end = jobs[seed % len(jobs)]
            started = time.perf_counter()
            assert len(store.read_range(name, start, end)) == end - start
            longest[0] = max(longest[0], time.perf_counter() - started)

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, seed) for seed in range(4)]
        time.sleep(1)
        server.kill()
        time.sleep(OUTAGE_S)
        server.restart()
        time.sleep(8)
        stop.set()
        for reader in readers:
            reader.result()
    return longest[0]


def main() -> dict[str, object]:
    if missing := ceph_missing():
        raise SystemExit(missing)
    with (
        tempfile.TemporaryDirectory() as folder,
        Radosgw.start(Path(folder) / "ceph") as server,
        server.environment(),
    ):
        url = f"s3://{server.new_bucket()}/hidden"
        uploads = {client: upload(url, folder, client) for client in CPU_LIMITS}
        sides = {name: Side(name, url) for name in SIDES}
        readings: dict[tuple[str, str], list[Reading]] = {
            (name, size): [] for name in SIDES for size in RANGES
        }
        for number in range(-1, ROUNDS):  # round -1 warms up
            for size in RANGES:
                for name in SIDES if number % 2 else SIDES[::-1]:
                    reading = sides[name].read(size, seed=number)
                    if number >= 0:
                        readings[name, size].append(reading)
        for process in sides.values():
            process.stop()
        stalls = {client: outage(server, url, client) for client in CPU_LIMITS}
    ratios, goals = {}, {}
    for client, limit in CPU_LIMITS.items():
        for size in RANGES:
            pairs = zip(readings[client, size], readings["raw", size], strict=True)
            ratios[f"{client}/raw MB/s, {size}"] = statistics.median(
                mine.mb_per_s / bare.mb_per_s for mine, bare in pairs
            )
            cpu = statistics.median(reading.cpu_s_per_gb for reading in readings[client, size])
            ratios[f"{limit} CPU s/GB / {client}, {size}"] = limit / cpu
            goals |= {
                f"{client}/raw MB/s, {size}": 0.75,
                f"{limit} CPU s/GB / {client}, {size}": 1.0,
            }
    figures = {
        f"{name} {size}": {
            field: round(statistics.median(getattr(r, field) for r in found), 3)
            for field in Reading._fields
        }
        for (name, size), found in readings.items()
    }
    return {
        "name": "cache_s3",
        "ratios": ratios,
        "goals": goals,
        "ok": all(ratios[name] >= goal for name, goal in goals.items()),
        "readings": figures,
        "upload_mb_per_s": uploads,
        "longest_stall_s_in_a_15_s_outage": stalls,
        "machine": (
            f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        ),
    }


if __name__ == "__main__":
    if len(sys.argv) > 2:
        side(*sys.argv[1:3])
    else:
        print(json.dumps(main()))
