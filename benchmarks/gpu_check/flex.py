"""Attention of training at every kind of heads: compiled, right, and compiled few times.

Outputs and gradients are compared with those of dense attention in float32, sample by sample.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_check.random_models import draft_spec, recipe, target_config
from benchmarks.gpu_check.section import Bench, relative_error
from deepspec.config.families import HeadGeometry
from deepspec.model.attention import BlockVisibility, attend
from deepspec.model.attention_path import training_path

# Number of heads, of key-value heads, head dimension; the ones that matter most come first.
CASES = [
    ("Qwen3-4B", (32, 8, 128), torch.bfloat16),
    ("demo", (4, 2, 32), torch.float32),
    ("Gemma4", (16, 1, 512), torch.bfloat16),
    ("Qwen3-14B", (40, 8, 128), torch.bfloat16),
    ("demo", (4, 2, 32), torch.bfloat16),
    ("Qwen3-4B", (32, 8, 128), torch.float32),
    ("Gemma4", (16, 1, 512), torch.float32),
]
REHEARSED = [("demo", (4, 2, 32), torch.float32)]
LARGEST = (4400, 7, 9, 1)
# Blocks, block size, samples, copies of the slots among the keys. On both sides of 128 queries,
# since PyTorch has another kernel for fewer.
BATCHES = [
    *((blocks, 7, 1, 1) for blocks in (1, 5, 10, 16, 18, 19)),
    (300, 7, 3, 1),
    LARGEST,
    *((7, 1, 1, copies) for copies in (0, 1, 6)),  # Eagle3
    *((2000, 1, 3, copies) for copies in (0, 1, 6)),
]
SMALL = [(1, 7, 1, 1), (19, 7, 3, 1), (7, 1, 1, 0), (7, 1, 1, 6)]
SAMPLE_TOKENS = 910
WITHIN = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
MOST_COMPILATIONS = 8  # PyTorch compiles no more often, and then keeps all scores


class Tensors(NamedTuple):
    queries: Tensor
    context: tuple[Tensor, Tensor]
    own: list[tuple[Tensor, Tensor]]
    visibility: BlockVisibility

    def leaves(self) -> list[Tensor]:
        return [self.queries, *self.context, *(part for pair in self.own for part in pair)]

    def run(self) -> Tensor:
        scale = self.queries.shape[-1] ** -0.5
        return attend(self.queries, self.context, self.own, self.visibility, scale=scale)

    def dense(self) -> "Tensors":
        """The same in float32 by the other path."""
        leaves = [x.detach().float().requires_grad_(x.requires_grad) for x in self.leaves()]
        own = list(zip(leaves[3::2], leaves[4::2], strict=True))
        visibility = self.visibility.along("dense")
        return Tensors(leaves[0], (leaves[1], leaves[2]), own, visibility)


def make(bench: Bench, heads: Sequence[int], dtype: torch.dtype, batch: Sequence[int]) -> Tensors:
    """Samples of equal length, their blocks at places all over them."""
    num_heads, num_kv_heads, head_dim = heads
    num_blocks, block_size, num_samples, copies = batch
    num_tokens = 40 if bench.rehearse else SAMPLE_TOKENS
    num_slots = num_blocks * block_size
    random = torch.Generator(bench.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        shape = (1, *shape, head_dim)
        x = torch.randn(shape, generator=random, device=bench.device)
        return x.to(dtype).requires_grad_(not bench.rehearse)

    pairs = [
        (normal(num_kv_heads, num), normal(num_kv_heads, num))
        for num in (num_samples * num_tokens, *[num_slots] * copies)
    ]
    # what is seen is of the host, where plans are made
    sample = torch.arange(num_blocks) * num_samples // num_blocks
    seen = 1 + torch.arange(num_blocks) * 37 % num_tokens
    first = sample * num_tokens
    visibility = BlockVisibility(first, first + seen, block_size, "flex")
    return Tensors(normal(num_slots, num_heads), pairs[0], pairs[1:], visibility)


def check(bench: Bench) -> None:
    for name, heads, dtype in REHEARSED if bench.rehearse else CASES:
        what = f"{name} {heads} {str(dtype).removeprefix('torch.')}"
        torch._dynamo.reset()  # a training has one kind of heads
        torch._dynamo.utils.counters.clear()
        began = time.perf_counter()
        with bench.part(f"{what}: path"):
            any_spec = draft_spec(bench, target_config(bench), recipe(bench).target.layer_ids)
            geometry = HeadGeometry(*heads, values_are_keys=False)
            spec = dataclasses.replace(any_spec, heads=geometry)
            weight = torch.ones(2, device=bench.device, dtype=dtype)
            path = training_path(weight, spec, block_size=7)
            wanted = "dense" if bench.rehearse else "flex"
            bench.findings.check(f"{what}: path", path == wanted, path)
        for batch in SMALL if bench.rehearse else BATCHES:
            with bench.part(f"{what}: {batch}"):
                compare(bench, make(bench, heads, dtype, batch), f"{what}: {batch}", WITHIN[dtype])
        bench.findings.figure(f"{what}: all batches, s", time.perf_counter() - began)
        num = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        bench.findings.check(f"{what}: compiled few times", num <= MOST_COMPILATIONS, num)
        with bench.part(f"{what}: speed"):
            speed(bench, make(bench, heads, dtype, SMALL[1] if bench.rehearse else LARGEST), what)


def compare(bench: Bench, tensors: Tensors, what: str, within: float) -> None:
    """Outputs, and on a GPU gradients: a CPU's flex attention has no backward pass."""
    dense = tensors.dense()
    found, wanted = tensors.run(), dense.run()
    errors = [relative_error(found, wanted)]
    if not bench.rehearse:
        direction = torch.randn_like(found)
        found.backward(direction)
        wanted.backward(direction.float())
        pairs = zip(tensors.leaves(), dense.leaves(), strict=True)
        errors += [relative_error(ours.grad, theirs.grad) for ours, theirs in pairs]
    bench.findings.check(f"{what}: as dense", max(errors) <= within, f"{max(errors):.1e}")


def speed(bench: Bench, tensors: Tensors, what: str) -> None:
    with torch.no_grad():
        taken = bench.seconds(tensors.run)
    num = tensors.queries.shape[1]
    bench.findings.figure(f"{what}: forward of {num} queries, ms", 1e3 * taken)
    if not bench.rehearse:
        taken = bench.seconds(lambda: tensors.run().sum().backward())
        bench.findings.figure(f"{what}: forward and backward, ms", 1e3 * taken)
