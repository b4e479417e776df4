"""One flipped bit anywhere is found and named, its shard made missing; what is whole stays."""

import json
from pathlib import Path

import pytest

from deepspec.artifacts import verify
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import ArtifactKey, Record, index_file
from deepspec.cache.damage import locate_damage
from deepspec.cache.index import decode_rows
from deepspec.storage.urls import open_store
from tests.cache.samples import make_cache, make_sample

KEY = ArtifactKey("hidden", "tiny", "0123456789ab", {}, ())


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    made = make_cache(
        Artifact(open_store(str(tmp_path / "store")), KEY),
        [[make_sample(4 * s + r, 6 + r) for r in range(4)] for s in range(3)],
    )
    return made


def problems(artifact: Artifact, tmp_path: Path) -> list[str]:
    return list(verify.verify_artifact(artifact, locate_damage, num_threads=4))


def flip(artifact: Artifact, relative: str, offset: int) -> None:
    path = Path(artifact.store.path(artifact.path(relative)))
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def rows_of(artifact: Artifact, record: Record) -> list[dict[str, int]]:
    return decode_rows(artifact.store.read(artifact.path(index_file(record)))).to_pylist()


def test_nothing_is_said_of_a_whole_cache(artifact: Artifact, tmp_path: Path):
    assert problems(artifact, tmp_path) == []


@pytest.mark.parametrize(
    "column", ["context", "last_hidden", "input_ids", "loss_mask", "sample_id"]
)
def test_a_flipped_bit_names_shard_row_and_column(artifact: Artifact, tmp_path: Path, column: str):
    import pyarrow as pa

    from deepspec.cache.format import column_buffers

    record = artifact.records()[1]
    row = rows_of(artifact, record)[2]
    data = Path(artifact.store.path(artifact.path(record.file))).read_bytes()
    message = pa.py_buffer(data).slice(row["offset"], row["num_bytes"])
    schema = pa.ipc.read_schema(pa.py_buffer(artifact.store.read(artifact.path("schema.arrow"))))
    buffers = column_buffers(pa.ipc.read_record_batch(message, schema))
    target = buffers[schema.names.index(column)]
    flip(artifact, record.file, row["offset"] + target.address - message.address)
    (problem,) = problems(artifact, tmp_path)
    assert "shard 1" in problem
    assert f"row 2, column {column}" in problem
    assert list(artifact.records()) == [0, 2]


def test_every_byte_of_a_shard_is_covered(artifact: Artifact):
    """Header, padding and footer as well: the shard's checksum is over the whole file, and
    damage there has a name, too.
    """
    record = artifact.records()[0]
    size = record.num_bytes
    for offset in (0, 9, rows_of(artifact, record)[0]["offset"] + 5, size - 3, size // 2):
        flip(artifact, record.file, offset)
        assert artifact.store.checksum(artifact.path(record.file)) != record.checksum
        assert locate_damage(artifact, record)
        flip(artifact, record.file, offset)
    assert artifact.store.checksum(artifact.path(record.file)) == record.checksum


def test_a_cut_off_shard_says_from_which_row(artifact: Artifact, tmp_path: Path):
    record = artifact.records()[2]
    path = Path(artifact.store.path(artifact.path(record.file)))
    path.write_bytes(path.read_bytes()[: rows_of(artifact, record)[1]["offset"] + 3])
    (problem,) = problems(artifact, tmp_path)
    assert "row 1 and what follows is cut off" in problem


def test_a_missing_shard_a_missing_record_and_damaged_rows_are_named(
    artifact: Artifact, tmp_path: Path
):
    records = artifact.records()
    artifact.store.remove(artifact.path(records[0].file))
    artifact.store.remove(artifact.path("records/00001.json"))
    flip(artifact, index_file(records[2]), 400)
    said = problems(artifact, tmp_path)
    assert len(said) == 3
    assert "shard 1: its record is missing" in said[0]
    assert "shard 0: " in said[1]
    assert "is gone" in said[1]
    assert f"{index_file(records[2])} is damaged" in said[2]
    assert artifact.records() == {}


@pytest.mark.parametrize("name", ["schema.arrow", "index.arrow", "records.arrow"])
def test_a_damaged_file_beside_the_shards_is_removed_and_the_shards_stay(
    artifact: Artifact, tmp_path: Path, name: str
):
    flip(artifact, name, 100)
    assert any(name in problem for problem in problems(artifact, tmp_path))
    assert len(artifact.records()) == 3
    assert artifact.manifest() is None


def test_a_flipped_bit_in_a_record_is_found(artifact: Artifact, tmp_path: Path):
    path = Path(artifact.store.path(artifact.path("records/00001.json")))
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "tokens": fields["tokens"] + 1}))
    assert any(
        "shard 1: its record is damaged" in problem for problem in problems(artifact, tmp_path)
    )
    assert list(artifact.records()) == [0, 2]


def test_a_changed_manifest_is_found(artifact: Artifact, tmp_path: Path):
    path = Path(artifact.store.path(artifact.path("manifest.json")))
    fields = json.loads(path.read_text())
    fields["totals"]["rows"] += 1
    path.write_text(json.dumps(fields))
    assert "manifest.json is damaged" in problems(artifact, tmp_path)[0]
    assert len(artifact.records()) == 3


def test_a_shard_made_anew_while_it_was_being_judged_keeps_its_record(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Hashing takes hours at tens of terabytes; what another run commits meanwhile is not what
    was found damaged.
    """
    record = artifact.records()[1]
    flip(artifact, record.file, record.num_bytes // 2)
    newer = record.model_copy(update={"host": "another"})
    original = artifact.store.checksum

    def slow(relative: str) -> str:
        if relative == artifact.path(record.file):
            artifact.store.write(
                artifact.path("records/00001.json"), newer.model_dump_json().encode()
            )
        return original(relative)

    monkeypatch.setattr(artifact.store, "checksum", slow)
    assert problems(artifact, tmp_path) == []
    assert artifact.read_records([1])[1] == newer


def test_a_bad_sector_is_damage_like_any_other(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import errno
    import os

    original, bad = artifact.store.checksum, artifact.path(artifact.records()[2].file)

    def unreadable(relative: str) -> str:
        if relative == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(relative)

    monkeypatch.setattr(artifact.store, "checksum", unreadable)
    (problem,) = problems(artifact, tmp_path)
    assert "shard 2" in problem
    assert "Input/output error" in problem
    assert list(artifact.records()) == [0, 1]
