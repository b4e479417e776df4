"""Opening a sealed cache of 10,000 shards and 1.3 million samples in a fresh process, and the first
batch out of it.

Goals: opened in under 50 ms with under 15 MB more memory, no shard touched and no pandas imported;
the first batch in under a second. The shards are hard links to one file.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import xxhash

from benchmarks._measure import ROUNDS, hidden_artifact, make_samples, raw_layout, result
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Record, index_file
from deepspec.cache.index import INDEX, decode_rows, write_index
from deepspec.cache.reader import SCHEMA
from deepspec.cache.shard_writer import ShardWriter
from deepspec.storage.store import file_checksum

SHARDS, ROWS = 10_000, 130
GOALS = {"50 ms/open": 1.0, "15 MB/growth": 1.0, "1 s/first batch": 1.0, "10 s/finalise": 1.0}
OPENED = """
import json, sys, time
import numpy, pyarrow, torch, psutil
from benchmarks._measure import hidden_artifact
from deepspec.cache.reader import HiddenCache
from deepspec.config.recipes import load_run
from deepspec.train.batches import StepData
from deepspec.train.distributed import World
from pathlib import Path
artifact, process = hidden_artifact(Path(sys.argv[1])), psutil.Process()
before, began = process.memory_info().rss, time.perf_counter()
cache = HiddenCache(artifact)
opened, growth = time.perf_counter() - began, process.memory_info().rss - before
began = time.perf_counter()
config = load_run("demo", ["train.epochs=1", "train.max_steps=null"])
data = StepData(cache, config, World(0, 1, torch.device("cpu")))
batch = next(data.batches(0, len))
first = time.perf_counter() - began
assert len(cache) == 1_300_000 and "pandas" not in sys.modules
print(json.dumps({"open_s": opened, "growth": growth, "first_batch_s": first}))
"""


def build(artifact: Artifact) -> float:
    """The cache; returns the seconds that sealing it took."""
    layout, store = raw_layout(layers=2, hidden_size=8), artifact.store
    artifact.create({})
    store.write(artifact.path(SCHEMA), layout.schema.serialize().to_pybytes())
    with store.staged() as local:
        with ShardWriter(local, layout, 0) as writer:
            for sample in make_samples(ROWS, 16, layout):
                writer.write(writer.encode(sample, held_out=0))
            written = writer.finish()
        checksum, size = file_checksum(local), local.stat().st_size
        store.publish(local, artifact.path("shards/first"))
    rows, first = (decode_rows(written.index_rows), Path(store.path(artifact.path("shards/first"))))
    for folder in ("rows", "records"):
        Path(store.path(artifact.path(folder))).mkdir()
    for shard in range(SHARDS):
        table = rows.set_column(
            1, rows.schema.field("shard"), pa.array([shard] * ROWS, pa.uint32())
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as out:
            out.write_batch(table)
        data = bytes(sink.getvalue())
        record = Record(
            artifact=artifact.key.fingerprint,
            shard=shard,
            file=f"shards/{shard:05d}-{checksum[:12]}.arrow",
            num_bytes=size,
            checksum=checksum,
            rows=ROWS,
            tokens=16 * ROWS,
            index_checksum=xxhash.xxh3_128_hexdigest(data),
        ).with_digest()
        Path(store.path(artifact.path(record.file))).hardlink_to(first)
        Path(store.path(artifact.path(index_file(record)))).write_bytes(data)
        Path(store.path(artifact.path(f"records/{shard:05d}.json"))).write_text(
            record.model_dump_json()
        )
    began = time.perf_counter()
    write_index(artifact, list(artifact.records().values()))
    artifact.seal(shards=range(SHARDS), files=(SCHEMA, INDEX), inputs={})
    return time.perf_counter() - began


def main() -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        finalise_s = build(hidden_artifact(Path(folder)))
        rounds = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", OPENED, folder],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for _ in range(ROUNDS + 1)
        ][1:]
    found = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    ratios = {
        "50 ms/open": 0.05 / found["open_s"],
        "15 MB/growth": 15e6 / max(found["growth"], 1),
        "1 s/first batch": 1.0 / found["first_batch_s"],
        "10 s/finalise": 10.0 / finalise_s,
    }
    return result("cache_open", ratios, GOALS, **found, finalise_s=finalise_s)


if __name__ == "__main__":
    print(json.dumps(main()))
