"""No two living runs have the same shard, whatever moment they ask at; a dead one has none."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.leases import LOST_S, Claim, Claims, has_ended, this_process, words
from deepspec.artifacts.records import ArtifactKey
from deepspec.storage.urls import open_store


def claims(
    store: Path, run: str, *, dealer: str = "", process: str = "elsewhere 1 2 3 4"
) -> Claims:
    artifact = Artifact(open_store(str(store)), ArtifactKey("answers", "x", "1", {}, ()))
    return Claims(artifact, Claim(run=run, run_id=run, dealer=dealer, process=process))


def test_the_second_run_gets_what_the_first_one_does_not_work_on_and_the_rest_when_that_has_ended(
    tmp_path: Path,
):
    with claims(tmp_path, "second") as second:
        with claims(tmp_path, "first") as first:
            assert first.take([1, 2, 3]).shards == [1, 2, 3]
            mine, others = second.take([2, 3, 4, 5])
            assert (mine, words(others)) == ([4, 5], "run 'first' on elsewhere")
            assert second.take([3]).shards == [] and second.take([7, 8]).shards == [7, 8]
            first.release()
            assert second.take([2, 3]).shards == [2, 3]
        assert first.take([9]).shards == [9] and second.take([9]).shards == [9], (
            "what has been left says nothing any more"
        )


def test_a_run_works_on_what_its_dealer_claims_and_goes_on_without_it(tmp_path: Path):
    with (
        claims(tmp_path, "parent") as parent,
        claims(tmp_path, "child", dealer="parent") as child,
        claims(tmp_path, "other") as other,
    ):
        assert parent.take([1, 2]).shards == [1, 2] == child.take([1, 2]).shards
        parent.release()
        assert other.take([1, 2, 3]).shards == [3], "the child goes on without its parent"


def test_a_run_that_is_begun_again_waits_for_what_its_first_try_left_running(tmp_path: Path):
    with (
        claims(tmp_path, "parent", dealer="") as again,
        claims(tmp_path, "first child", dealer="parent") as left,
    ):
        assert left.take([1]).shards == [1]
        assert again.take([1, 2]).shards == [2], (
            "a child of the first try still makes the other one"
        )
        with claims(tmp_path, "second child", dealer="parent") as later:
            assert later.take([1, 2]).shards == [2]
    with claims(tmp_path, "cut off") as first, claims(tmp_path, "cut off") as second:
        assert first.take([1, 2]).shards == [1, 2] and second.take([1, 2]).shards == [], (
            "the same run, in two processes"
        )


def test_a_run_that_is_not_heard_of_for_a_minute_has_nothing(tmp_path: Path):
    with claims(tmp_path, "first") as first, claims(tmp_path, "second") as second:
        first.take([1])
        file = Path(second.store.path(f"{first.folder}/{first.name}"))
        for age_s, wins in ((LOST_S - 10, False), (LOST_S + 10, True)):
            os.utime(file, (file.stat().st_atime, file.parent.stat().st_mtime - age_s))
            assert bool(second.take([1]).shards) == wins


def test_a_run_whose_process_has_ended_on_this_machine_has_nothing_at_once(tmp_path: Path):
    code = "import sys; from deepspec.artifacts.leases import this_process; print(this_process(), flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process = child.stdout.readline().strip()
    with claims(tmp_path, "killed", process=process) as killed, claims(tmp_path, "next") as later:
        killed.take([1])
        assert not has_ended(process) and later.take([1]).shards == []
        child.kill()
        child.wait()
        assert has_ended(process) and later.take([1]).shards == [1]
    assert (
        not has_ended(this_process()) and not has_ended("") and not has_ended("elsewhere 1 2 3 4")
    )


@pytest.mark.parametrize("trial", range(3))
def test_of_many_that_ask_at_the_same_moment_each_shard_has_one(tmp_path: Path, trial: int):
    together = threading.Barrier(6)

    def ask(number: int) -> tuple[Claims, list[int]]:
        asking = claims(tmp_path, f"run {number}")
        together.wait(30)
        return asking, asking.take(range(number, number + 5)).shards

    with ThreadPoolExecutor(6) as pool:
        taken = [shards for _, shards in pool.map(ask, range(6))]
    dealt = [shard for shards in taken for shard in shards]
    assert sorted(dealt) == list(range(10))
