"""Everything around the work: 10,000 scripted shards that take 0 seconds, in 100 groups, on one
lane, with a real Prefect server.

`python -m flows regenerate` is run as a user runs it, against a server of its own on SQLite:
scheduling, 100 children, 10,000 commits, progress, artifacts, records and the seal. At 1 second
each the shards would take 10,000 s on that lane. Goals: all of it in less than 5 % of that, and
less than 20 MB more in the server's database. `python -m benchmarks.orchestration 500 5` is a
smaller one, of 500 shards in 5 groups.
"""

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from benchmarks._measure import result
from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.process.launch import RunRequest
from deepspec.prompts.stage import run_prompts
from flows.server import PrivateServer

SHARDS, GROUPS = 10_000, 100
SHARD_S = 1.0  # what a shard would take if it were work
SHARE = 0.05  # of that, which everything else may cost
GROWTH_MB = 20
QUIET_S = 10.0  # without a new page in the database everything is recorded


def request_of(folder: Path, shards: int, groups: int) -> RunRequest:
    """A run of so many prompts, each a shard, in groups of one size on one lane."""
    source = folder / "prompts.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": f"question {number}"}) + "\n" for number in range(shards))
    )
    files = json.dumps({"kind": "files", "paths": [str(source)]})
    settings = [
        f"prompts.source={files}",
        "prompts.limit=null",
        "prompts.shard_rows=1",
        "answers.engine=benchmarks._scripted:Free",
    ]
    settings += [
        f"resources.runner.shards_per_task={shards // groups}",
        "resources.devices.lanes=1",
        "resources.storage.min_free_gb=0",
        "resources.devices.type=cpu",
    ]
    return RunRequest("dspark-qwen3-4b", tuple(settings), str(folder / "store"))


def database_bytes(home: Path) -> int:
    """Pages in use, those that are still in the write-ahead log included."""
    with closing(sqlite3.connect(f"file:{home / 'prefect.db'}?mode=ro", uri=True)) as database:
        sizes = {
            name: database.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        }
    return (sizes["page_count"] - sizes["freelist_count"]) * sizes["page_size"]


def settled_bytes(home: Path) -> int:
    """The database's size once nothing is added any more: events are recorded some time after
    they happened.
    """
    size, since = database_bytes(home), time.monotonic()
    while time.monotonic() - since < QUIET_S:
        time.sleep(1.0)
        if (now := database_bytes(home)) != size:
            size, since = now, time.monotonic()
    return size


def recorded_groups(home: Path) -> int:
    """Task runs that the server knows to have ended well, the one that publishes the artifact
    left out.
    """
    with closing(sqlite3.connect(f"file:{home / 'prefect.db'}?mode=ro", uri=True)) as database:
        query = (
            "SELECT COUNT(*) FROM task_run WHERE state_type = 'COMPLETED' AND name LIKE 'answers%'"
        )
        return int(database.execute(query).fetchone()[0])


def measure(folder: Path, shards: int, groups: int) -> tuple[float, float]:
    """Seconds of the whole run, and megabytes that the server's database has more after it."""
    request, home = request_of(folder, shards, groups), folder / "prefect"
    config = load_run(request.source, request.overrides, store=request.store)
    run_prompts(Run(config))
    server = PrivateServer(home)
    try:
        server.wait()
        before = settled_bytes(home)
        started = time.monotonic()
        command = [sys.executable, "-m", "flows", "regenerate", *request.arguments()]
        # the server's address is in the environment
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        seconds = time.monotonic() - started
        assert stage_status(Run(config), "answers").sealed
        grown_mb = (settled_bytes(home) - before) / 1e6
        assert recorded_groups(home) == groups, (
            "every group is a task run that the server has recorded"
        )
        return seconds, grown_mb
    finally:
        server.stop()


def main(shards: int = SHARDS, groups: int = GROUPS) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        seconds, grown_mb = measure(Path(folder).absolute(), shards, groups)
    ratios = {
        "5 % of the shards' time at 1 s / everything around them": SHARE
        * SHARD_S
        * shards
        / seconds,
        "20 MB / growth of the server's database": GROWTH_MB / grown_mb,
    }
    more = {
        "shards": shards,
        "groups": groups,
        "seconds": round(seconds, 1),
        "grown_mb": round(grown_mb, 2),
    }
    return result("orchestration", ratios, dict.fromkeys(ratios, 1.0), **more)


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
