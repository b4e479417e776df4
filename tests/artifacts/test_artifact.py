"""The commit rule: data first, record last, and resume by set subtraction."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactKey, Counts, Record
from deepspec.artifacts.side_files import failures, put_failure, put_rejects
from deepspec.errors import ArtifactMismatch, DamagedData, DataError, StoreError
from deepspec.storage.urls import open_store

KEY = ArtifactKey("answers", "tiny", "0123456789ab", {"answers": {"seed": 1}}, ())


def make_artifact(url: str | Path) -> Artifact:
    artifact = Artifact(open_store(str(url)), KEY)
    artifact.create({})
    return artifact


def commit(artifact: Artifact, shard: int, data: bytes, upstream: str = "up") -> Record:
    with artifact.store.staged() as local:
        local.write_bytes(data)
        return artifact.commit(shard, local, Counts(rows=2, tokens=len(data)), upstream=upstream)


@pytest.fixture(params=["disk", "memory"])
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    url = str(tmp_path / "store") if request.param == "disk" else f"memory://{tmp_path.name}"
    return make_artifact(url)


def test_a_shard_is_committed_once_its_record_is_there(artifact: Artifact):
    record = commit(artifact, 17, b"seventeen")
    assert artifact.records() == {17: record}
    assert artifact.fetch_shard(record).read_bytes() == b"seventeen"
    assert "00017.json" in artifact.store.names(artifact.path("records"))


def test_an_equal_second_commit_changes_nothing(artifact: Artifact):
    first = commit(artifact, 0, b"same")
    assert commit(artifact, 0, b"same") == first


def test_an_unequal_second_commit_is_refused_and_leaves_the_first_whole(artifact: Artifact):
    first = commit(artifact, 0, b"mine")
    with pytest.raises(ArtifactMismatch, match="already committed with other contents"):
        commit(artifact, 0, b"other")
    assert artifact.fetch_shard(first).read_bytes() == b"mine"


def test_a_shard_made_from_newer_upstream_data_replaces_its_record(artifact: Artifact):
    commit(artifact, 0, b"old", upstream="before")
    assert commit(artifact, 0, b"new", upstream="after") == artifact.record(0)


def test_the_digest_depends_on_content_and_not_on_who_made_it_when(tmp_path: Path):
    digests = []
    for order in ([0, 1, 2], [2, 0, 1]):
        artifact = make_artifact(tmp_path / "".join(map(str, order)))
        for shard in order:
            commit(artifact, shard, b"shard %d" % shard)
        digests.append(artifact.seal(shards=range(3), inputs={"prompts/x": "d"}).digest)
    assert digests[0] == digests[1]


def test_sealing_without_one_of_its_shards_is_an_error(artifact: Artifact):
    commit(artifact, 0, b"zero")
    with pytest.raises(KeyError):
        artifact.seal(shards=range(2), inputs={})


def test_another_recipe_in_the_same_folder_is_refused_by_field(tmp_path: Path):
    make_artifact(tmp_path)
    other = Artifact(open_store(str(tmp_path)), KEY._replace(recipe={"answers": {"seed": 2}}))
    with pytest.raises(ArtifactMismatch, match="recipe"):
        other.create({})


def test_a_damaged_shard_is_named(tmp_path: Path):
    artifact = make_artifact(tmp_path)
    record = commit(artifact, 3, b"some bytes")
    path = Path(artifact.store.path(artifact.path(record.file)))
    path.write_bytes(b"some bytez")
    with pytest.raises(DamagedData, match="shard 3"):
        artifact.fetch_shard(record)


def test_a_torn_record_counts_as_missing(tmp_path: Path):
    artifact = make_artifact(tmp_path)
    commit(artifact, 0, b"zero")
    commit(artifact, 1, b"one")
    Path(artifact.store.path(artifact.path("records/00001.json"))).write_text('{"shard": 1, "fi')
    assert list(artifact.records()) == [0]


def test_a_record_with_a_flipped_bit_counts_as_missing(artifact: Artifact):
    """Not only a torn one: a digit that turned into another would still be JSON."""
    commit(artifact, 0, b"zero")
    data = artifact.store.read(artifact.path("records/00000.json"))
    artifact.store.write(
        artifact.path("records/00000.json"), data.replace(b'"tokens": 4', b'"tokens": 5')
    )
    assert artifact.records() == {}


def test_a_record_of_another_shard_counts_as_missing(artifact: Artifact):
    commit(artifact, 0, b"zero")
    artifact.store.write(
        artifact.path("records/00001.json"),
        artifact.store.read(artifact.path("records/00000.json")),
    )
    assert list(artifact.records()) == [0]


def test_a_sealed_artifact_says_what_it_holds_without_a_look_at_its_records(artifact: Artifact):
    """10,000 records are 10,000 requests; the sealed table is one."""
    made = {shard: commit(artifact, shard, b"shard %d" % shard) for shard in range(3)}
    artifact.seal(shards=range(3), inputs={})
    asked: list[str] = []
    original = artifact.store.read_many
    artifact.store.read_many = lambda names: asked.extend(names) or original(names)  # type: ignore[method-assign]
    assert artifact.records() == made
    assert asked == [artifact.path("records.arrow")]


def test_a_shard_redone_after_sealing_is_seen_at_once(artifact: Artifact):
    for shard in range(3):
        commit(artifact, shard, b"shard %d" % shard)
    artifact.seal(shards=range(3), inputs={})
    artifact.store.remove(artifact.path("records/00001.json"))
    assert list(artifact.records()) == [0, 2]
    redone = commit(artifact, 1, b"another")
    assert artifact.records()[1] == redone
    assert artifact.manifest() is None


def test_an_artifact_of_another_format_version_is_refused_by_name(tmp_path: Path):
    make_artifact(tmp_path)
    with pytest.raises(ArtifactMismatch, match="format"):
        Artifact(open_store(str(tmp_path)), KEY._replace(format=2)).create({})


def test_a_record_of_another_artifact_counts_as_missing(tmp_path: Path):
    """Copied over by hand, say: what it names was made by another recipe."""
    other = Artifact(open_store(str(tmp_path)), KEY._replace(fingerprint="ba9876543210"))
    other.create({})
    commit(other, 0, b"theirs")
    artifact = make_artifact(tmp_path)
    artifact.store.write(
        artifact.path("records/00000.json"), other.store.read(other.path("records/00000.json"))
    )
    assert artifact.records() == {}
    assert commit(artifact, 0, b"ours") == artifact.records()[0]


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_record_that_names_a_file_outside_the_artifact_counts_as_missing(
    artifact: Artifact, name: str
):
    record = commit(artifact, 0, b"zero").model_copy(update={"file": name}).with_digest()
    artifact.store.write(artifact.path("records/00000.json"), record.model_dump_json().encode())
    assert artifact.records() == {}


def test_a_manifest_with_a_path_outside_the_artifact_is_refused(artifact: Artifact):
    commit(artifact, 0, b"zero")
    manifest = artifact.seal(shards=range(1), inputs={}).model_dump(mode="json")
    manifest["files"]["../../secret"] = {"num_bytes": 1, "checksum": "0"}
    artifact.store.write(artifact.path("manifest.json"), json.dumps(manifest).encode())
    with pytest.raises(DamagedData, match="the file is damaged"):
        artifact.manifest()


RACER = textwrap.dedent(
    """
    import sys, time
    from tests.artifacts.test_artifact import commit, make_artifact
    artifact = make_artifact(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    for shard in range(40):
        commit(artifact, shard, b"shard %d" % shard)
    """
)


def test_workers_that_race_for_the_same_shards_end_with_one_record_each(tmp_path: Path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        racer.stdout.readline()
    for racer in racers:
        racer.communicate("go\n")
        assert racer.returncode == 0
    artifact = make_artifact(tmp_path)
    assert list(artifact.records()) == list(range(40))
    assert artifact.store.names(".staged") == []


def test_a_failure_is_kept_until_its_shard_is_committed(artifact: Artifact):
    put_failure(artifact, 4, DataError("a bad row", where="row 3"))
    assert failures(artifact) == {4: "a bad row"}
    commit(artifact, 4, b"four")
    assert failures(artifact) == {}


def test_rejects_are_written_as_lines_with_reasons(artifact: Artifact):
    put_rejects(artifact, 0, [{"row": 3, "reason": "no_messages"}])
    line = artifact.store.read(artifact.path("rejects/00000.jsonl"))
    assert json.loads(line) == {"row": 3, "reason": "no_messages"}


def test_no_path_leads_out_of_the_store(tmp_path: Path):
    store = open_store(str(tmp_path))
    for path in ("../other", "a/../../b", "/etc/passwd"):
        with pytest.raises(DamagedData):
            store.path(path)


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot write"):
        open_store(str(tmp_path / "file")).check_writable()


def test_too_little_free_space_is_refused(tmp_path: Path):
    with pytest.raises(StoreError, match="GB are free"):
        open_store(str(tmp_path)).check_writable(min_free_gb=1e9)


def test_an_unknown_kind_of_store_is_refused():
    with pytest.raises(StoreError):
        open_store("nosuch://bucket")


WRITER = textwrap.dedent(
    """
    import sys
    from tests.artifacts.test_artifact import commit, make_artifact
    artifact = make_artifact(sys.argv[1])
    print("ready", flush=True)
    for shard in range(10_000):
        if shard not in artifact.records():
            commit(artifact, shard, b"x" * 200_000 + b"%d" % shard)
    """
)


def test_sigkill_at_any_point_of_a_commit_leaves_no_record_without_its_data(tmp_path: Path):
    """Killed a dozen times in the middle of committing, every shard that has a record has its
    bytes, too.
    """
    for attempt in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            writer.wait(timeout=0.02 + 0.013 * attempt)
        except subprocess.TimeoutExpired:
            os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    artifact = make_artifact(tmp_path)
    records = artifact.records()
    assert records
    for record in records.values():
        assert artifact.fetch_shard(record).stat().st_size == record.num_bytes
