"""No two living runs have the same shard, whenever they request it; a dead one has none."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.leases import LOST_S, Lease, Leases, has_ended, holders_text, this_process
from deepspec.artifacts.records import ArtifactKey
from deepspec.storage.urls import open_store


def leases(
    store: Path, run: str, *, parent: str = "", process: str = "elsewhere 1 2 3 4"
) -> Leases:
    artifact = Artifact(open_store(str(store)), ArtifactKey("answers", "x", "1", {}, ()))
    return Leases(artifact, Lease(run=run, run_id=run, parent_run_id=parent, process=process))


def test_the_second_run_gets_what_the_first_one_does_not_work_on_and_the_rest_when_that_has_ended(
    tmp_path: Path,
):
    with leases(tmp_path, "second") as second:
        with leases(tmp_path, "first") as first:
            assert first.acquire([1, 2, 3]).shards == [1, 2, 3]
            mine, others = second.acquire([2, 3, 4, 5])
            assert (mine, holders_text(others)) == ([4, 5], "run 'first' on elsewhere")
            assert second.acquire([3]).shards == [] and second.acquire([7, 8]).shards == [7, 8]
            first.release()
            assert second.acquire([2, 3]).shards == [2, 3]
        assert first.acquire([9]).shards == [9] and second.acquire([9]).shards == [9], (
            "a lease that was given up counts for nothing"
        )


def test_a_run_works_on_what_its_parent_has_leased_and_goes_on_without_it(tmp_path: Path):
    with (
        leases(tmp_path, "parent") as parent,
        leases(tmp_path, "child", parent="parent") as child,
        leases(tmp_path, "other") as other,
    ):
        assert parent.acquire([1, 2]).shards == [1, 2] == child.acquire([1, 2]).shards
        parent.release()
        assert other.acquire([1, 2, 3]).shards == [3], "the child goes on without its parent"


def test_a_run_that_is_begun_again_waits_for_what_its_first_try_left_running(tmp_path: Path):
    with (
        leases(tmp_path, "parent", parent="") as again,
        leases(tmp_path, "first child", parent="parent") as left,
    ):
        assert left.acquire([1]).shards == [1]
        assert again.acquire([1, 2]).shards == [2], (
            "a child of the first try still makes the other one"
        )
        with leases(tmp_path, "second child", parent="parent") as later:
            assert later.acquire([1, 2]).shards == [2]
    with leases(tmp_path, "cut off") as first, leases(tmp_path, "cut off") as second:
        assert first.acquire([1, 2]).shards == [1, 2] and second.acquire([1, 2]).shards == [], (
            "the same run, in two processes"
        )


def test_a_run_that_renews_nothing_for_a_minute_has_nothing(tmp_path: Path):
    with leases(tmp_path, "first") as first, leases(tmp_path, "second") as second:
        first.acquire([1])
        file = Path(second.store.path(f"{first.folder}/{first.name}"))
        for age_s, wins in ((LOST_S - 10, False), (LOST_S + 10, True)):
            os.utime(file, (file.stat().st_atime, file.parent.stat().st_mtime - age_s))
            assert bool(second.acquire([1]).shards) == wins


def test_a_run_whose_process_ended_on_this_machine_loses_its_leases_at_once(tmp_path: Path):
    code = (
        "import sys; from deepspec.artifacts.leases import this_process; "
        "print(this_process(), flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process = child.stdout.readline().strip()
    with leases(tmp_path, "killed", process=process) as killed, leases(tmp_path, "next") as later:
        killed.acquire([1])
        assert not has_ended(process) and later.acquire([1]).shards == []
        child.kill()
        child.wait()
        assert has_ended(process) and later.acquire([1]).shards == [1]
    assert (
        not has_ended(this_process()) and not has_ended("") and not has_ended("elsewhere 1 2 3 4")
    )


@pytest.mark.parametrize("trial", range(3))
def test_of_many_requests_at_the_same_moment_each_shard_goes_to_one_run(tmp_path: Path, trial: int):
    together = threading.Barrier(6)

    def ask(number: int) -> tuple[Leases, list[int]]:
        asking = leases(tmp_path, f"run {number}")
        together.wait(30)
        return asking, asking.acquire(range(number, number + 5)).shards

    with ThreadPoolExecutor(6) as pool:
        acquired = [shards for _, shards in pool.map(ask, range(6))]
    assigned = [shard for shards in acquired for shard in shards]
    assert sorted(assigned) == list(range(10))
