"""The share of a training step that waits for data, at the demo's size: its draft, batch and sample
lengths, a local cache.

Random states of 960 samples, whose median is 88 tokens. The cache is read as one that memory holds
(mapped) and as a larger one (preadv). Goal: at most 5 % of the time, so 0.95 of it without waiting.
"""

import json
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks._measure import ROUNDS, result
from benchmarks._training import QWEN3, make_trainer, random_cache
from deepspec.cache.reader import HiddenCache
from deepspec.config.recipes import load_run
from deepspec.train.step import train_step

LENGTHS = {40: 120, 56: 140, 72: 160, 88: 180, 112: 150, 144: 120, 184: 90}  # tokens: samples
STEPS = 10  # a round
TARGET = QWEN3 | {
    "vocab_size": 1024,
    "hidden_size": 96,
    "intermediate_size": 240,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def measure(cache: HiddenCache, folder: Path) -> float:
    """The median over rounds of the share of time that training waited."""
    config = load_run("demo", store=str(folder))
    trainer = make_trainer(config, cache, TARGET, torch.device("cpu"))
    shares = []
    for end in range(STEPS, (ROUNDS + 2) * STEPS, STEPS):
        for step in range(end - STEPS, end):
            train_step(trainer, step)
        shares.append(trainer.throughput.read(end).data_wait_share)
    return statistics.median(shares[1:])  # the first round begins with nothing read ahead


def main() -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        mapped = random_cache(folder, LENGTHS, hidden_size=TARGET["hidden_size"])
        read = HiddenCache(mapped.artifact)
        read.mapped = False  # read as a cache larger than memory is
        shares = {"mapped": measure(mapped, folder), "preadv": measure(read, folder)}
    ratios = {f"time without waiting, {side}": 1.0 - share for side, share in shares.items()}
    return result(
        "data_wait",
        ratios,
        dict.fromkeys(ratios, 0.95),
        waiting={side: round(share, 4) for side, share in shares.items()},
    )


if __name__ == "__main__":
    print(json.dumps(main()))
