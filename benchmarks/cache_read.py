"""Reading random samples of 200, 1,000 and 4,000 tokens, warm, against the bare system calls and a
reader that copies.

Goals: preadv and decode at least 0.9 of bare preadv; mapped, decoded and copied at least 0.85 of a
raw mapped copy; decoding without a copy under 150 us; into the batch at least 1.5 x as fast as a
reader that first copies every field into fresh memory.
"""

import json
import mmap
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks._measure import (
    LAYERS,
    alternate,
    hidden_artifact,
    make_samples,
    orders,
    raw_layout,
    result,
)
from deepspec.cache.reader import HiddenCache
from tests.cache.samples import make_cache

LENGTHS = {200: 64, 1000: 16, 4000: 4}  # tokens a sample: samples; 0.4 to 0.5 GB each
READS = {200: 192, 1000: 48, 4000: 16}
GOALS = {
    "preadv + decode/preadv": 0.9,
    "mapped + decode + copy/mapped copy": 0.85,
    "150 us/decode": 1.0,
    "into the batch/copying reader": 1.5,
}
BATCH = 8  # samples that a copying reader holds until they are a batch
HASHED = "preadv + hash + decode/preadv"


def measure(folder: Path, num_tokens: int) -> dict[str, float]:
    """The ratios at one length."""
    layout = raw_layout()
    artifact = make_cache(
        hidden_artifact(folder), [make_samples(LENGTHS[num_tokens], num_tokens, layout)], layout
    )
    mapped_cache, cache, always = (
        HiddenCache(artifact),
        HiddenCache(artifact),
        HiddenCache(artifact, check_reads="always"),
    )
    cache.mapped = always.mapped = False  # read as a cache larger than memory is
    path = artifact.store.path(artifact.path(cache.files[0]))
    numbers, largest = orders(len(cache), READS[num_tokens])[0], int(cache.index.num_bytes.max())
    places = [
        (int(cache.index.offset[number]), int(cache.index.num_bytes[number])) for number in numbers
    ]
    buffer, descriptor = np.zeros(largest, dtype=np.uint8), os.open(path, os.O_RDONLY)
    with Path(path).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    whole, arrow = np.frombuffer(mapped, dtype=np.uint8), pa.py_buffer(mapped)
    room = [
        torch.zeros(num_tokens, codec.width, dtype=torch.bfloat16)
        for codec in (layout.context, layout.last_hidden)
    ]

    def each(action: Callable[[int, int, int], object]) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            for number, (offset, num_bytes) in zip(numbers, places, strict=True):
                action(number, offset, num_bytes)
            return (time.perf_counter() - began) / len(numbers)

        return run

    def decoded(reader: HiddenCache) -> Callable[[int, int, int], object]:
        def read(number: int, offset: int, num_bytes: int) -> None:
            sample = reader.read(number, buffer)
            sample.context.decode()
            sample.last_hidden.decode()

        return read

    def copied(number: int, offset: int, num_bytes: int) -> None:
        sample = mapped_cache.read(number, buffer)
        sample.context.decode(out=room[0])
        sample.last_hidden.decode(out=room[1][: int(cache.index.num_last[number])])

    held = deque[list[torch.Tensor]](maxlen=BATCH)

    def copying(number: int, offset: int, num_bytes: int) -> None:
        """Field by field out of the map into memory of its own, and from there into the batch,
        as a reader of flat files does.
        """
        sample = layout.decode(arrow.slice(offset, num_bytes))
        fields = (
            sample.input_ids,
            sample.loss_mask,
            *sample.context.parts,
            *sample.last_hidden.parts,
        )
        # until its batch is made
        held.append([torch.from_numpy(tensor.numpy().copy()) for tensor in fields])
        room[0].copy_(held[-1][2].view(torch.bfloat16))
        room[1][: len(held[-1][3])].copy_(held[-1][3].view(torch.bfloat16))

    message = arrow.slice(*places[0])
    seconds = alternate(
        {
            "preadv": each(
                lambda number, offset, num_bytes: os.preadv(
                    descriptor, [buffer.data[:num_bytes]], offset
                )
            ),
            "read": each(decoded(cache)),
            "hashed": each(decoded(always)),
            "mapped": each(
                lambda number, offset, num_bytes: np.copyto(
                    buffer[:num_bytes], whole[offset : offset + num_bytes]
                )
            ),
            "mapped + decode": each(copied),
            "copying": each(copying),
            "decode": each(lambda *_: layout.decode(message).context.decode()),
        }
    )
    os.close(descriptor)
    assert layout.context.num_layers == LAYERS
    return {
        "preadv + decode/preadv": seconds["preadv"] / seconds["read"],
        "mapped + decode + copy/mapped copy": seconds["mapped"] / seconds["mapped + decode"],
        "150 us/decode": 150e-6 / seconds["decode"],
        "into the batch/copying reader": seconds["copying"] / seconds["mapped + decode"],
        HASHED: seconds["preadv"] / seconds["hashed"],
    }


def main() -> dict[str, object]:
    torch.set_num_threads(1)
    found = {}
    for num_tokens in LENGTHS:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            found[num_tokens] = measure(Path(folder), num_tokens)
    ratios = {
        name: statistics.median(each[name] for each in found.values()) for name in (*GOALS, HASHED)
    }
    return result("cache_read", ratios, GOALS, by_tokens=found)


if __name__ == "__main__":
    print(json.dumps(main()))
