"""Writing shards: hashed, in the background, against a plain inline write and fsync of the same
bytes.

Goals: at least 0.9 of the plain write; while computing a sample takes longer than writing it, the
computing side waits less than 5 % of the time. Where the disk itself is the limit nothing can be
faster than the plain write; what the background is worth then is shown by the same two with
computing in between.
"""

import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks._measure import alternate, make_samples, raw_layout, result
from deepspec.cache.format import HiddenSample
from deepspec.cache.shard_writer import Background, ShardWriter
from deepspec.storage.urls import open_store

NUM_SAMPLES, NUM_TOKENS, SHARDS = 5, 1000, 4  # 30 MB a sample, 0.6 GB a round
WAITING_BYTES = 128_000_000
GOALS = {"async/plain": 0.9, "0.05/stalled": 1.0}
COMPUTING = "async/plain, computing between"


def encode_and_write(writer: ShardWriter, sample: HiddenSample) -> None:
    writer.write(writer.encode(sample, held_out=0))


def main() -> dict[str, object]:
    layout = raw_layout()
    samples = make_samples(NUM_SAMPLES, NUM_TOKENS, layout)
    pieces = [
        memoryview(part.numpy().reshape(-1))
        for sample in samples
        for part in (*sample.context.parts, *sample.last_hidden.parts)
    ]
    num_bytes = sum(len(piece) for piece in pieces) * SHARDS
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = open_store(folder)

        def plain(compute_s: float = 0.0) -> float:
            """Bytes a second of a loop that writes each sample as it comes, and waits for it."""
            began = time.perf_counter()
            for shard in range(SHARDS):
                with (Path(folder) / f"plain-{shard}").open("wb", buffering=0) as file:
                    for number, piece in enumerate(pieces):
                        time.sleep(compute_s if number % 2 == 0 else 0)  # two pieces a sample
                        file.write(piece)
                    os.fsync(file.fileno())
            return num_bytes / (time.perf_counter() - began)

        def background(compute_s: float = 0.0) -> tuple[float, float]:
            """Bytes a second, and the share of the time that the computing side waited; a shard
            is published alongside the next.
            """
            began, stalled = time.perf_counter(), 0.0
            with ExitStack() as staged, ThreadPoolExecutor(1) as committer:
                for shard in range(SHARDS):
                    local = staged.enter_context(store.staged())
                    with (
                        ShardWriter(local, layout, shard) as writer,
                        Background(WAITING_BYTES) as waiting,
                    ):
                        for sample in samples:
                            time.sleep(compute_s)
                            waiting.submit(
                                partial(encode_and_write, writer, sample),
                                num_bytes=sample.num_bytes,
                            )
                        waiting.submit(writer.finish, num_bytes=0)
                    committer.submit(store.publish, local, f"shard-{shard}")
                    stalled += waiting.stalled_s
            seconds = time.perf_counter() - began
            return num_bytes / seconds, stalled / seconds

        speed = alternate({"plain": plain, "async": lambda: background()[0]})
        compute_s = 1.3 * num_bytes / SHARDS / NUM_SAMPLES / speed["async"]
        stalls: list[float] = []

        def computing() -> float:
            rate, share = background(compute_s)
            stalls.append(share)
            return rate

        busy = alternate({"plain": lambda: plain(compute_s), "async": computing})
        stalled = statistics.median(stalls)
    ratios = {
        "async/plain": speed["async"] / speed["plain"],
        "0.05/stalled": 0.05 / max(stalled, 1e-4),
        COMPUTING: busy["async"] / busy["plain"],
    }
    return result(
        "cache_write",
        ratios,
        GOALS,
        mb_per_s={name: rate / 1e6 for name, rate in speed.items()},
        stalled=stalled,
    )


if __name__ == "__main__":
    print(json.dumps(main()))
