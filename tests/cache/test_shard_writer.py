"""Shards: what is written is what any Arrow reader reads, and where the index says it is."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash

from deepspec.cache.codecs import make_codec
from deepspec.cache.format import EncodedTensor, HiddenSample, Layout
from deepspec.cache.index import decode_rows
from deepspec.cache.shard_writer import MAGIC_BYTES, Background, HashedFile, ShardWriter
from deepspec.storage.store import file_checksum
from tests.cache.samples import LAYOUT, make_sample, same, write_shard


@pytest.fixture
def shard(tmp_path: Path):
    samples = [make_sample(number, tokens) for number, tokens in enumerate((5, 1, 40, 3))]
    path = tmp_path / "00000.arrow"
    written = write_shard(path, samples)
    return samples, path, written, decode_rows(written.index_rows).to_pylist()


def message(path: Path, row: dict[str, int]) -> bytes:
    return path.read_bytes()[row["offset"] : row["offset"] + row["num_bytes"]]


def test_each_sample_comes_back_from_its_offset_alone(shard):
    samples, path, _, rows = shard
    for sample, row in zip(samples, rows, strict=True):
        assert same(LAYOUT.decode(message(path, row)), sample)


def test_the_checksums_are_those_of_the_bytes_on_disk(shard):
    _, path, written, rows = shard
    assert written.checksum == file_checksum(path)
    for row in rows:
        assert row["checksum"] == xxhash.xxh3_64_intdigest(message(path, row))


def test_messages_lie_one_behind_the_other_and_aligned(shard):
    _, _, _, rows = shard
    assert rows[0]["offset"] == MAGIC_BYTES + len(LAYOUT.schema.serialize())
    for before, row in pairwise(rows):
        assert row["offset"] == before["offset"] + before["num_bytes"]
    assert all(row["offset"] % 8 == 0 for row in rows)


def test_any_arrow_reader_opens_a_shard(shard):
    samples, path, _, _ = shard
    table = pa.ipc.open_file(str(path)).read_all()
    assert table.column("sample_id").to_pylist() == [sample.sample_id for sample in samples]
    assert table.column("input_ids")[2].as_py() == list(range(40))
    assert table.schema.metadata[b"target"] == b"tiny"


def test_raw_states_are_decoded_without_a_copy(shard):
    _, path, _, rows = shard
    buffer = pa.py_buffer(message(path, rows[2]))
    decoded = LAYOUT.decode(buffer).context.decode()
    assert buffer.address <= decoded.data_ptr() < buffer.address + buffer.size


def test_a_shard_without_samples_is_a_whole_file(tmp_path: Path):
    path = tmp_path / "empty.arrow"
    written = write_shard(path, [])
    assert pa.ipc.open_file(str(path)).num_record_batches == 0
    assert written.checksum == file_checksum(path)
    assert decode_rows(written.index_rows).num_rows == 0


def test_a_file_is_hashed_as_a_whole_and_by_message_however_it_is_cut_into_writes(tmp_path: Path):
    pieces = [b"header", b"first", b"", b"of two", b"second message"]
    with HashedFile(tmp_path / "file") as file:
        file.start_message(3)  # inside the first piece, as pyarrow's header and message may come
        for piece in pieces[:4]:
            file.write(piece)
        assert file.message_digest() == xxhash.xxh3_64_intdigest(b"".join(pieces[:4])[3:])
        file.start_message(file.num_bytes)
        file.write(np.frombuffer(pieces[4], dtype=np.uint8))
        assert file.message_digest() == xxhash.xxh3_64_intdigest(pieces[4])
    whole = b"".join(pieces)
    assert (tmp_path / "file").read_bytes() == whole and file.num_bytes == len(whole)
    assert file.digest() == xxhash.xxh3_128_hexdigest(whole)


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Files may not grow beyond this: a write that would cross the limit is cut off there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_one_call_of_the_system_leaves_over_is_written_by_the_next(tmp_path: Path):
    """One call ends at 2 GiB, or where a disk is nearly full."""
    file = HashedFile(tmp_path / "file")
    with file, file_size_limit(1 << 19), pytest.raises(OSError, match="too large"):
        file.write(b"x" * (1 << 20))
    assert (tmp_path / "file").stat().st_size == 1 << 19


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_is_an_error_of_the_writer():
    with (
        pytest.raises(OSError, match="No space"),
        ShardWriter(Path("/dev/full"), LAYOUT, 0) as writer,
    ):
        writer.write(writer.encode(make_sample(0, 5), held_out=0))


def test_the_background_runs_jobs_in_order_and_holds_at_most_its_bytes():
    done, held, most = [], 0, 0
    gate = threading.Event()

    def job(number: int) -> None:
        nonlocal held
        gate.wait(5)
        done.append(number)
        held -= 10

    with Background(max_bytes=30) as background:
        for number in range(10):
            threading.Timer(0.05, gate.set).start()
            background.submit(lambda number=number: job(number), num_bytes=10)
            held += 10
            most = max(most, held)
    assert done == list(range(10))
    assert most <= 40  # three waiting and the one just given back
    assert background.stalled_s > 0


def test_an_error_in_the_background_ends_the_block_and_later_jobs_do_not_run():
    done = []

    def broken() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"), Background(max_bytes=10) as background:
        background.submit(broken, num_bytes=10)
        background.submit(lambda: done.append(1), num_bytes=10)
    assert done == []


@pytest.mark.slow
def test_a_sample_of_more_than_two_gigabytes_comes_back_whole(tmp_path: Path):
    """Trap C7: 32-bit offsets would end at 2 GiB."""
    layout = Layout(
        make_codec("raw", num_layers=8, hidden_size=4096),
        make_codec("raw", num_layers=1, hidden_size=8),
    )
    tokens = 2**31 // (2 * layout.context.width) + 5
    context = torch.zeros(tokens, 2 * layout.context.width, dtype=torch.uint8)
    context[-1] = torch.arange(context.shape[1], dtype=torch.int64).to(torch.uint8)
    nothing = torch.zeros(0, 16, dtype=torch.uint8)
    ids, spans = torch.arange(tokens, dtype=torch.int32), torch.zeros(0, 2, dtype=torch.int32)
    sample = HiddenSample(
        1,
        ids,
        ids.to(torch.uint8),
        EncodedTensor(layout.context, (context,)),
        EncodedTensor(layout.last_hidden, (nothing,)),
        spans,
    )
    path = tmp_path / "large.arrow"
    row = decode_rows(write_shard(path, [sample], layout=layout).index_rows).to_pylist()[0]
    with pa.memory_map(str(path)) as source:
        found = layout.decode(source.read_buffer().slice(row["offset"], row["num_bytes"]))
        assert found.context.parts[0].shape == context.shape
        assert torch.equal(found.context.parts[0][-1], context[-1])
        assert (
            pa.ipc.open_file(source).get_batch(0).column("context").values.type.byte_width
            == context.shape[1]
        )
    path.unlink()
