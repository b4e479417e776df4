"""Working through shards: one fails and the others go on, a full disk makes the stage wait,
damage is set aside.
"""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.failure_limits import failures_allowed, stage_size
from deepspec.artifacts.records import ArtifactKey, Counts, Record
from deepspec.artifacts.run import Run
from deepspec.artifacts.shard_loop import Work, work_through
from deepspec.artifacts.side_files import failures
from deepspec.errors import DamagedData, ShardsFailed, TransientError
from deepspec.storage.store import Store
from deepspec.storage.urls import open_store
from tests.conftest import tiny_run

KEY = ArtifactKey("answers", "tiny", "0123456789ab", {}, ())


def works(count: int) -> list[Work]:
    return [
        Work(
            shard,
            Record(
                artifact="up", shard=shard, file="x", num_bytes=0, checksum=f"up{shard}", rows=1
            ),
        )
        for shard in range(count)
    ]


def make(work: Work, local: Path) -> Counts:
    local.write_bytes(b"shard %d" % work.shard * 1000)
    return Counts(rows=1)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    made = Artifact(open_store(str(tmp_path / "store")), KEY)
    made.create({})
    return made


def test_a_shard_is_committed_while_the_next_is_made(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    committing, making = threading.Event(), threading.Event()
    put = artifact.put

    def slow(record, *arguments):
        if record.shard == 0:
            committing.set()
            assert making.wait(10), "shard 1 was not begun while shard 0 was being committed"
        return put(record, *arguments)

    def noticing(work: Work, local: Path) -> Counts:
        if work.shard == 1:
            assert committing.wait(10)
            making.set()
        return make(work, local)

    monkeypatch.setattr(artifact, "put", slow)
    work_through(Run(tiny_run(tmp_path)), artifact, works(3), noticing, lambda event: None)
    assert list(artifact.records()) == [0, 1, 2]


def test_a_shard_that_fails_is_noted_and_the_others_are_made(artifact: Artifact, tmp_path: Path):
    def failing(work: Work, local: Path) -> Counts:
        if work.shard == 1:
            local.write_bytes(b"what there is of it")
            raise DamagedData("not finite", where="sample 5")
        return make(work, local)

    with pytest.raises(ShardsFailed, match="shard 1: not finite"):
        work_through(Run(tiny_run(tmp_path)), artifact, works(3), failing, lambda event: None)
    assert list(artifact.records()) == [0, 2]
    assert failures(artifact) == {1: "not finite"}
    assert artifact.store.read(artifact.path("quarantine/00001.arrow")) == b"what there is of it"
    assert artifact.store.names(".staged") == []


def hopeless(made: list[int], *, transient: bool = False):
    """Notes each shard in `made` and fails it, all but every third; the third ones are
    committed.
    """

    def make_or_fail(work: Work, local: Path) -> Counts:
        made.append(work.shard)
        if work.shard % 3 == 2:
            return make(work, local)
        raise TransientError("busy") if transient else DamagedData("not finite")

    return make_or_fail


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("resources.retries.max_failed=0.01", 10),
        ("resources.retries.max_failed=0.25", 15),
        ("resources.retries.max_failed=0", 0),
    ],
)
def test_where_too_many_shards_fail_for_good_no_more_are_begun(
    artifact: Artifact, tmp_path: Path, override: str, allowed: int
):
    made: list[int] = []
    with pytest.raises(ShardsFailed) as caught:
        work_through(
            Run(tiny_run(tmp_path, override)),
            artifact,
            works(60),
            hopeless(made),
            lambda event: None,
        )
    assert len(caught.value.failures) == allowed + 1 and len(made) < 30
    assert list(artifact.records()) == [shard for shard in made if shard % 3 == 2], (
        "what was made is kept"
    )
    left = 60 - len(made)
    assert (
        f"{allowed + 1} of 60 shards failed; {left} were not begun, "
        "because more failed for good than" in str(caught.value)
    )
    assert f"resources.retries.max_failed allows ({allowed})" in str(
        caught.value
    ) and "--shards" not in str(caught.value)


def test_a_shard_that_fails_is_told_at_once_with_its_reason(artifact: Artifact, tmp_path: Path):
    events = []
    with pytest.raises(ShardsFailed):
        work_through(Run(tiny_run(tmp_path)), artifact, works(3), hopeless([]), events.append)
    told = [event for event in events if event["event"] in ("failed", "shard")]
    failed = {"event": "failed", "stage": "answers", "what": "not finite", "transient": False}
    assert told[:2] == [{**failed, "shard": 0}, {**failed, "shard": 1}] and told[2]["shard"] == 2


def test_shards_that_may_do_better_next_time_stop_nothing(artifact: Artifact, tmp_path: Path):
    made: list[int] = []
    with pytest.raises(ShardsFailed, match="20 of 30 shards failed: "):
        work_through(
            Run(tiny_run(tmp_path)),
            artifact,
            works(30),
            hopeless(made, transient=True),
            lambda event: None,
        )
    assert made == list(range(30))


def test_failures_allowed_are_ten_or_one_percent_of_the_whole_stage(tmp_path: Path):
    config = tiny_run(tmp_path)
    assert [
        failures_allowed(config.resources.retries, shards)
        for shards in (1, 10, 1000, 1099, 1100, 10_000)
    ] == [10, 10, 10, 10, 11, 100]
    store = open_store(str(tmp_path / "store"))
    before = Artifact(store, ArtifactKey("prompts", "tiny", "ba9876543210", {}, ()))
    for shard in range(50):
        store.write(before.path(f"records/{shard:05d}.json"), b"{}")
    artifact = Artifact(store, KEY._replace(inputs=(before.key.as_input(),)))
    assert stage_size(artifact, 4) == 50
    assert stage_size(artifact, 70) == 70


def test_below_the_watermark_the_stage_waits_and_goes_on_by_itself(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    free = iter([0.5e9, 0.5e9, 3e9, 3e9, 3e9])
    monkeypatch.setattr(Store, "free_bytes", lambda store: next(free))
    events = []
    config = tiny_run(
        tmp_path, "resources.storage.min_free_gb=1", "resources.storage.space_poll_s=0.01"
    )
    work_through(Run(config), artifact, works(2), make, events.append)
    assert list(artifact.records()) == [0, 1]
    assert [event["event"] for event in events].count("paused") == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_in_the_middle_of_a_shard_is_waited_for(
    artifact: Artifact, tmp_path: Path, code: int
):
    refusals = iter([True, True, False])

    def full_twice(work: Work, local: Path) -> Counts:
        local.write_bytes(b"half")
        if work.shard == 0 and next(refusals):
            raise OSError(code, os.strerror(code))
        return make(work, local)

    work_through(
        Run(tiny_run(tmp_path, "resources.storage.space_poll_s=0.01")),
        artifact,
        works(2),
        full_twice,
        lambda event: None,
    )
    assert list(artifact.records()) == [0, 1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    ).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_really_full_disk_loses_nothing_and_everything_is_committed_once_there_is_room(
    small_disk: Path, tmp_path: Path
):
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 3_200_000)
    artifact = Artifact(open_store(str(small_disk / "store")), KEY)
    artifact.create({})

    def large(work: Work, local: Path) -> Counts:
        local.write_bytes(bytes([work.shard]) * 300_000)
        return Counts(rows=1)

    paused = threading.Event()
    helper = threading.Thread(
        target=lambda: paused.wait(30) and (time.sleep(0.2), ballast.unlink())
    )
    helper.start()
    config = tiny_run(tmp_path, "resources.storage.space_poll_s=0.05")
    work_through(
        Run(config),
        artifact,
        works(6),
        large,
        lambda event: paused.set() if event["event"] == "paused" else None,
    )
    helper.join()
    assert paused.is_set()
    assert [
        artifact.fetch_shard(record).read_bytes() for record in artifact.records().values()
    ] == [bytes([n]) * 300_000 for n in range(6)]
