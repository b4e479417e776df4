"""The hidden-state cache: what is written is what is read, by one read per sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from deepspec.data.cache import FOOTER_MAGIC, INDEX_DTYPE, HiddenSample, Layout, ShardWriter, decode, last_hidden_spans
from deepspec.errors import ArtifactMismatch

LAYOUT = Layout(context_width=6, hidden_size=3, metadata={"target": "tiny"})


def make_sample(number: int, tokens: int) -> HiddenSample:
    generator = torch.Generator().manual_seed(number)
    mask = [index > tokens // 2 for index in range(tokens)]
    spans = torch.from_numpy(last_hidden_spans(mask))
    return HiddenSample(
        sample_id=2**63 + number,
        input_ids=torch.arange(tokens, dtype=torch.int32),
        loss_mask=torch.tensor(mask, dtype=torch.uint8),
        context=torch.randn(tokens, 6, generator=generator).bfloat16(),
        last_hidden=torch.randn(int(spans[:, 1].sum()), 3, generator=generator).bfloat16(),
        last_spans=spans,
    )


def same(first: HiddenSample, second: HiddenSample) -> bool:
    return first.sample_id == second.sample_id and all(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))


@pytest.fixture
def shard(tmp_path: Path):
    samples = [make_sample(number, tokens) for number, tokens in enumerate((5, 1, 40, 3))]
    path = tmp_path / "00000.arrow"
    with pa.OSFile(str(path), "wb") as sink:
        writer = ShardWriter(sink, LAYOUT, 7)
        for sample in samples:
            writer.append(sample, held_out=False)
        index = np.frombuffer(writer.close(), dtype=INDEX_DTYPE)
    return samples, path, index


def test_each_sample_comes_back_from_its_offset_alone(shard):
    samples, path, index = shard
    data = path.read_bytes()
    for sample, entry in zip(samples, index, strict=True):
        message = data[int(entry["offset"]) : int(entry["offset"] + entry["num_bytes"])]
        assert same(decode(message, LAYOUT.schema(), LAYOUT), sample)


def test_the_index_checksum_is_that_of_the_bytes_on_disk(shard):
    import xxhash

    _, path, index = shard
    data = path.read_bytes()
    for entry in index:
        message = data[int(entry["offset"]) : int(entry["offset"] + entry["num_bytes"])]
        assert xxhash.xxh3_64_intdigest(message) == entry["checksum"]


def test_messages_lie_one_behind_the_other_and_aligned(shard):
    _, _, index = shard
    assert index["offset"][0] == FOOTER_MAGIC + len(LAYOUT.schema().serialize())
    assert (index["offset"][1:] == index["offset"][:-1] + index["num_bytes"][:-1]).all()
    assert (index["offset"] % 8 == 0).all()


def test_any_arrow_reader_opens_a_shard(shard):
    samples, path, _ = shard
    table = pa.ipc.open_file(str(path)).read_all()
    assert table.column("sample_id").to_pylist() == [sample.sample_id for sample in samples]
    assert table.column("input_ids")[2].as_py() == list(range(40))
    assert table.schema.metadata[b"target"] == b"tiny"


def test_decoding_copies_nothing(shard):
    _, path, index = shard
    with pa.memory_map(str(path)) as source:
        message = source.read_buffer()[int(index["offset"][2]) : int(index["offset"][2] + index["num_bytes"][2])]
    sample = decode(message, LAYOUT.schema(), LAYOUT)
    assert message.address <= sample.context.data_ptr() < message.address + message.size


@pytest.mark.parametrize(
    ("mask", "spans"),
    [
        ([0, 0, 1, 1, 0, 0], [[1, 4]]),
        ([1, 0, 0, 0, 1], [[0, 2], [3, 2]]),
        ([1, 0, 1], [[0, 3]]),
        ([0, 0, 0], []),
        ([1], [[0, 1]]),
    ],
)
def test_the_final_state_is_kept_one_position_beyond_each_supervised_run(mask: list[int], spans: list[list[int]]):
    assert last_hidden_spans([bool(value) for value in mask]).tolist() == spans


def test_kept_final_states_go_back_to_their_places():
    sample = make_sample(1, 8)
    full = sample.full_last_hidden()
    kept = [index for start, length in sample.last_spans.tolist() for index in range(start, start + length)]
    assert torch.equal(full[kept], sample.last_hidden)
    assert full[[index for index in range(8) if index not in kept]].abs().sum() == 0


def test_another_format_version_is_refused():
    schema = LAYOUT.schema().with_metadata({**LAYOUT.schema().metadata, b"version": b"2"})
    with pytest.raises(ArtifactMismatch, match="version 2"):
        Layout.of(schema)
