"""Capture: what lies in the cache is what the target computes, and every row is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from deepspec.data.cache import HiddenCache
from deepspec.data.beside import files_beside
from deepspec.data.capture import run_capture
from deepspec.data.chat import load_chat, target_folder
from deepspec.data.index import INDEX
from deepspec.data.rows import capture_rows, token_batches
from deepspec.data.tables import read_table
from deepspec.errors import ArtifactMismatch, DamagedData
from deepspec.lineage import artifact_of
from deepspec.target import load_target
from deepspec.verify import verify_stage
from tests.conftest import tiny_run


@pytest.fixture(scope="module")
def cache(captured: Path) -> HiddenCache:
    return HiddenCache(artifact_of(tiny_run(captured), "hidden"))


def test_every_answer_is_one_sample_with_its_id_and_split(captured: Path, cache: HiddenCache):
    answers = artifact_of(tiny_run(captured), "answers")
    rows = [row for record in answers.records().values() for row in read_table(answers.fetch_shard(record)).to_pylist()]
    assert sorted(cache.index.sample_id.tolist()) == sorted(row["id"] for row in rows)
    held_out = {row["id"] for row in rows if row["held_out"]}
    assert set(cache.index.sample_id[cache.index.held_out == 1].tolist()) == held_out


def test_cached_states_are_those_of_the_target_run_alone(captured: Path, cache: HiddenCache):
    """No padding, batch or order leaks into a row (trap C3), in bfloat16."""
    config = tiny_run(captured)
    target = load_target(config.target, folder=target_folder(config))
    for number in range(0, len(cache), 5):
        sample = cache[number]
        alone = target.forward(sample.input_ids.long()[None])
        torch.testing.assert_close(sample.context.decode().float(), alone.context[0], atol=2e-2, rtol=1e-2)
        kept = np.concatenate([np.arange(start, start + count) for start, count in sample.last_spans.tolist()])
        torch.testing.assert_close(sample.last_hidden.decode().float(), alone.last_hidden[0, kept], atol=2e-2, rtol=1e-2)


def test_supervised_tokens_are_the_answers(captured: Path, cache: HiddenCache):
    config = tiny_run(captured)
    answers = artifact_of(config, "answers")
    said = {
        row["id"]: row["turns"][0]["token_ids"]
        for record in answers.records().values()
        for row in read_table(answers.fetch_shard(record)).to_pylist()
    }
    for number in range(len(cache)):
        sample = cache[number]
        assert sample.input_ids[sample.loss_mask.bool()].tolist() == said[sample.sample_id]


def test_the_frozen_tensors_lie_beside_the_shards_and_name_no_place(captured: Path):
    artifact = artifact_of(tiny_run(captured), "hidden")
    manifest = artifact.manifest()
    assert manifest is not None
    assert set(manifest.files) == {*files_beside(tiny_run(captured)), INDEX}
    assert str(captured) not in artifact.store.read(artifact.path("target/config.json")).decode()


def test_rows_are_cut_at_max_length_and_rows_without_two_supervised_tokens_left_out(captured: Path):
    config = tiny_run(captured, "hidden.max_length=10")
    answers = artifact_of(config, "answers")
    rows = read_table(answers.fetch_shard(next(iter(answers.records().values())))).to_pylist()
    found = capture_rows(rows, load_chat(config), config.hidden)
    assert found.rows == []
    assert {reject["reason"] for reject in found.rejects} == {"too_little_supervised"}
    assert len(found.rejects) == len(rows)
    config = tiny_run(captured)
    assert len(capture_rows(rows, load_chat(config), config.hidden).rows) == len(rows)


def test_batches_fit_the_token_budget_once_padded(captured: Path):
    config = tiny_run(captured)
    answers = artifact_of(config, "answers")
    rows = read_table(answers.fetch_shard(next(iter(answers.records().values())))).to_pylist()
    captured_rows = capture_rows(rows, load_chat(config), config.hidden).rows
    batches = list(token_batches(captured_rows, 150))
    assert [row for batch in batches for row in batch] == captured_rows
    assert all(len(batch) * len(batch[-1].input_ids) <= 150 or len(batch) == 1 for batch in batches)


def test_a_flipped_bit_is_found_named_and_its_shard_captured_again(captured: Path, tmp_path: Path):
    store = tmp_path / "store"
    shutil.copytree(captured, store)
    config = tiny_run(store)
    artifact = artifact_of(config, "hidden")
    before, record = artifact.manifest(), artifact.record(2)
    assert before is not None
    assert record is not None
    path = Path(artifact.store.path(artifact.path(record.file)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    damaged = HiddenCache(artifact)
    with pytest.raises(DamagedData, match="of shard 2 is damaged"):
        for number in range(len(damaged)):
            damaged[number]
    problems = list(verify_stage(config, "hidden"))
    assert len(problems) == 1
    assert "shard 2" in problems[0]
    after = run_capture(config).manifest()
    assert after is not None
    assert after.digest == before.digest
    assert list(verify_stage(config, "hidden")) == []


def test_a_damaged_file_beside_the_shards_is_removed_by_verify_and_written_again(captured: Path, tmp_path: Path):
    store = tmp_path / "store"
    shutil.copytree(captured, store)
    config = tiny_run(store)
    artifact = artifact_of(config, "hidden")
    before = artifact.manifest()
    path = Path(artifact.store.path(artifact.path("frozen.safetensors")))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert len(list(verify_stage(config, "hidden"))) == 1
    after = run_capture(config).manifest()
    assert before is not None
    assert after is not None
    assert after.digest == before.digest


def test_an_unfinished_cache_is_refused(store: Path):
    with pytest.raises(ArtifactMismatch, match="not finished"):
        HiddenCache(artifact_of(tiny_run(store), "hidden"))
