"""A whole training step of DSpark against a bare PyTorch loop over one batch that is ready:
forward, backward, clip, AdamW.

What the step does beside those: reading and batching samples, metrics over ranks, checks. Goal: 0.9
of the bare loop's speed. On the CPU a small shape; on a CUDA machine Qwen3-4B's (random weights,
samples of 1,024 tokens), with the largest micro-batch that fits, found by doubling
`resources.memory.batch_tokens`, and with tokens/s and MFU. Either way with
the work of each part by arithmetic: FLOP, bytes, and the least milliseconds that a known GPU needs.
"""

import gc
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._measure import alternate, result
from benchmarks._step_work import Sizes, step_work
from benchmarks._training import QWEN3, QWEN3_4B, make_trainer, random_cache
from deepspec.cache.reader import HiddenCache
from deepspec.config.recipes import load_run
from deepspec.model.chunked_loss import MIN_CHUNK, chunk_elements
from deepspec.model.drafter import TrainBatch
from deepspec.target.loading import DTYPES
from deepspec.train.step import train_step
from deepspec.train.strategy import Replicated

GOAL = 0.9
ROUNDS = 20  # a step takes a second or less, and machines are shared
# dense bfloat16 FLOP/s and bytes/s, of the data sheets
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.0e12)}
SMALL = QWEN3 | {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


class Shape(NamedTuple):
    """What is trained; a step is one micro-batch."""

    recipe: str
    target: Mapping[str, Any]
    num_tokens: int  # of a sample
    overrides: tuple[str, ...] = ()


CPU = Shape("demo", SMALL, 128, ("draft.num_anchors=32",))
CUDA = Shape("dspark-qwen3-4b", QWEN3_4B, 1024)


class Steps:
    """The two sides over the same cache, at one micro-batch."""

    def __init__(
        self,
        shape: Shape,
        cache: HiddenCache,
        folder: Path,
        *,
        batch_tokens: int,
        device: torch.device,
    ) -> None:
        sizes = (
            f"resources.memory.batch_tokens={batch_tokens}",
            f"train.global_batch={batch_tokens // shape.num_tokens}",
            "train.max_steps=null",
        )
        config = load_run(
            shape.recipe, [*shape.overrides, *sizes, "train.epochs=1000"], store=str(folder)
        )
        self.trainer = make_trainer(config, cache, shape.target, device)
        self.strategy = cast("Replicated", self.trainer.strategy)
        self.data = self.trainer.data
        self.numbers = count()
        (self.group,) = self.data.micro_batches(0)
        self.batch = self.data.load(self.group)

    def whole(self) -> None:
        train_step(self.trainer, next(self.numbers))

    def bare(self, batch: TrainBatch | None = None) -> None:
        batch = batch or self.batch
        draft, optimizer, settings = (
            self.strategy.draft,
            self.strategy.optimizer,
            self.trainer.settings,
        )
        dtype = DTYPES[settings.compute_dtype]
        with torch.autocast(
            self.trainer.world.device.type, dtype=dtype, enabled=dtype != torch.float32
        ):
            output = draft.loss(batch, draft.plan(batch))
        (output.numerator / output.denominator).backward()
        nn.utils.clip_grad_norm_(draft.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def seconds(self) -> dict[str, float]:
        return alternate(
            {"whole": self.timed(self.whole), "bare": self.timed(self.bare)}, rounds=ROUNDS
        )

    def timed(self, side: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            side()
            if self.trainer.world.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        return run

    def flops(self) -> int:
        """Of the matrix products of a step, as PyTorch counts them for one of its samples, all
        alike: counting, flex attention is not compiled and would not fit into memory for all of
        them."""
        with FlopCounterMode(display=False) as counter:
            self.bare(self.data.load(self.group[:1]))
        return len(self.group) * int(counter.get_total_flops())


def largest(shape: Shape, cache: HiddenCache, folder: Path, device: torch.device) -> int:
    """The largest power-of-two micro-batch (tokens) of which a step fits into the GPU's memory."""
    batch_tokens = 4 * shape.num_tokens
    while True:
        gc.collect()  # the batches that were read ahead for the size before
        torch.cuda.empty_cache()
        try:
            steps = Steps(shape, cache, folder, batch_tokens=batch_tokens, device=device)
            for _ in range(2):
                steps.whole()
        except torch.OutOfMemoryError:
            return batch_tokens // 2
        del steps
        batch_tokens *= 2


def peaks() -> tuple[float, float] | None:
    """FLOP/s and bytes/s that the GPU's data sheet names; None for one that is not listed here."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((value for listed, value in PEAKS.items() if listed in name), None)


def mfu(flops: int, seconds: float) -> float | None:
    """Of the GPU's peak; None for one that is not listed here."""
    peak = peaks()
    return round(flops / seconds / peak[0], 3) if peak else None


def parts(steps: Steps) -> dict[str, dict[str, float]]:
    """Of a step's parts, their work, and how fast a listed GPU could do it."""
    draft, device = steps.strategy.draft, steps.trainer.world.device
    sizes = Sizes.of(
        draft.plan(steps.batch),
        chunk_slots=max(MIN_CHUNK, chunk_elements(device) // draft.spec.vocab_size),
        num_trained=sum(steps.strategy.sizes.values()),
        width=DTYPES[steps.trainer.settings.compute_dtype].itemsize,
    )
    found = {}
    for name, work in step_work(draft.spec, sizes).items():
        found[name] = {"tflop": round(work.flops / 1e12, 6), "gb": round(work.num_bytes / 1e9, 3)}
        if peak := peaks():
            seconds = max(work.flops / peak[0], work.num_bytes / peak[1])
            found[name]["least_ms"] = round(1e3 * seconds, 2)
    return found


def main() -> dict[str, object]:
    on_gpu = torch.cuda.is_available()
    shape, device = (CUDA, torch.device("cuda")) if on_gpu else (CPU, torch.device("cpu"))
    if not on_gpu:
        # two that wait for each other on shared cores measure those who share them
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        cache = random_cache(
            folder, {shape.num_tokens: 64}, hidden_size=shape.target["hidden_size"]
        )
        batch_tokens = largest(shape, cache, folder, device) if on_gpu else 8 * shape.num_tokens
        steps = Steps(shape, cache, folder, batch_tokens=batch_tokens, device=device)
        found = steps.seconds()
        flops, work = steps.flops(), parts(steps)
    more: dict[str, Any] = {
        "tokens_per_s": round(batch_tokens / found["whole"]),
        "tflops": round(flops / found["whole"] / 1e12, 3),
    }
    more |= {"batch_tokens": batch_tokens, "parts": work}
    more |= {"mfu": mfu(flops, found["whole"])} if on_gpu else {}
    return result(
        "train_step",
        {"bare loop/step": found["bare"] / found["whole"]},
        {"bare loop/step": GOAL},
        **more,
    )


if __name__ == "__main__":
    print(json.dumps(main()))
