"""Attention of training on NVIDIA GPUs, as far as compilers can tell without one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from deepspec.config.recipes import recipe_names
from tests.gpu.chips import CHIPS
from tests.gpu.harness import device_guard, in_child, missing

Heads = tuple[int, int, int]
Batch = tuple[int, int, int, int]
Case = tuple[Heads, str, Sequence[Batch]]

# [heads, key-value heads, head size] of each target that recipes name
HEADS: dict[str, Heads] = {
    "demo": (4, 2, 32),
    "qwen3-4b": (32, 8, 128),
    "qwen3-8b": (32, 8, 128),
    "qwen3-14b": (40, 8, 128),
    "gemma4-12b": (16, 1, 512),
}
OF_TESTS: set[Heads] = {(4, 2, 16), (4, 1, 16)}
QWEN3: Heads = HEADS["qwen3-4b"]
ALL = sorted({*HEADS.values(), *OF_TESTS})
# Blocks, block size, tokens and copies of a batch: DSpark's and DFlash's blocks see themselves
# once, the steps of Eagle3 no slots or those of the steps before. Both sides of 128 queries.
BLOCKS = [(blocks, 7, 1000, 1) for blocks in (1, 2, 4, 5, 10, 16, 18, 19, 300, 4400)]
STEPS = [(n, 1, n + 50, copies) for n in (1, 9, 33, 127, 128, 129, 5000) for copies in (0, 1, 6)]
SHORT: Batch = (10, 7, 1000, 1)  # 70 queries
A_FEW = [SHORT, (5, 7, 1000, 1), (18, 7, 1000, 1), (300, 7, 1000, 1)]  # 35, 126 and 2,100
FIRST = [batch for batch in BLOCKS if batch[0] in (1, 5, 10, 18, 19, 4400)]
FIRST += [(1, 1, 51, 0), (1, 1, 51, 6), (33, 1, 83, 1), (129, 1, 179, 6)]
# Without tensor cores, float32 has the same kernels on all chips.
ON_CHIPS = [(chip, "bfloat16") for chip in CHIPS] + [("sm_80", "float32"), ("sm_86", "float32")]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing():
        pytest.skip(reason)
    return device_guard(tmp_path_factory.mktemp("gpu"))


def compiled(guard: Path, chip: str, cases: Sequence[Case], *, compiling: bool) -> list[Any]:
    """What became of each case; no batch of any failed."""
    request = {"chip": chip, "compiling": compiling, "cases": cases}
    results = in_child("tests.gpu.attention_kernels", request, guard=guard, timeout_s=1800)
    failed = {
        (heads, dtype, batch): found["error"]
        for (heads, dtype, batches), result in zip(cases, results, strict=True)
        for batch, found in zip(batches, result["batches"], strict=True)
        if found["error"]
    }
    assert failed == {}
    return results


def test_every_recipe_has_heads_that_are_compiled_here() -> None:
    assert all(any(name.endswith(target) for target in HEADS) for name in recipe_names())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_batches_of_fewer_than_128_queries_have_a_kernel(guard: Path) -> None:
    """The first command on any GPU died: there PyTorch took its kernel for decoding, which has no
    configuration for 33 to 127 queries of Qwen3's heads. The preflight takes the step's shortest
    sample; small micro-batches and Eagle3 met it later.
    """
    compiled(guard, "sm_90", [(QWEN3, "bfloat16", A_FEW)], compiling=False)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_batch_has_a_kernel_and_no_length_compiles_again(guard: Path) -> None:
    others = [(HEADS[target], "bfloat16", [SHORT]) for target in ("demo", "gemma4-12b")]
    exact = [(heads, "float32", [SHORT]) for heads in (HEADS["demo"], (4, 1, 16))]
    every, *_ = compiled(
        guard,
        "sm_90",
        [(QWEN3, "bfloat16", [SHORT, *BLOCKS, *STEPS]), *others, *exact],
        compiling=False,
    )
    graphs = [found["new"] > 0 for found in every["batches"]]
    # Of one block, of one tile of queries and of more, for each block size: PyTorch takes a size of
    # one for fixed. Above eight it would stop compiling, and all scores would be kept.
    assert sum(graphs) <= 6


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads", ALL, ids=str)
def test_every_batch_has_a_kernel_if_it_is_the_first(guard: Path, heads: Heads, dtype: str) -> None:
    """A kernel is chosen for the batch that compiles it; others may find one that fits by luck."""
    compiled(guard, "sm_90", [(heads, dtype, [batch]) for batch in FIRST], compiling=False)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("chip", "dtype"), ON_CHIPS)
def test_kernels_fit_the_shared_memory_of_the_chip(guard: Path, chip: str, dtype: str) -> None:
    """On A10, 3090, 4090 and L4 the forward kernel of Qwen3's heads wanted 102,400 of 101,376
    bytes, and Gemma4's fitted no card.
    """
    # 14B's heads are as wide as 4B's
    targets = ["demo", "qwen3-4b", "gemma4-12b"]
    if dtype == "float32" and CHIPS[chip].shared_memory < 132_096:
        # Backward wants that much at the smallest tiles: the probe falls back to dense attention.
        targets.remove("gemma4-12b")
    cases = [(HEADS[target], dtype, [SHORT]) for target in targets]
    for result in compiled(guard, chip, cases, compiling=True):
        sizes = [made["shared_memory"] for made in result["kernels"] if made["shared_memory"]]
        assert len(sizes) == 2  # forward and backward
        assert max(sizes) <= CHIPS[chip].shared_memory


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("shared_memory", "path"), [(101_376, "flex"), (49_152, "dense")])
def test_the_probe_tells_what_fits(guard: Path, shared_memory: int, path: str) -> None:
    """It took 16 queries once, which had another kernel: a card on which it passed then failed at
    the first batch. What it compiles is what batches of more than a tile of queries take.
    """
    request = {"chip": "sm_89", "shared_memory": shared_memory, "heads": QWEN3, "dtype": "bfloat16"}
    (found,) = in_child("tests.gpu.probed_path", request, guard=guard, timeout_s=900)
    assert found["paths"] == [path, path]
    (line,) = found["logged"]
    if path == "flex":
        assert line.startswith("INFO training attention=flex (compiled)")
        assert any("backward" in name for name in found["probed"])
        assert found["added"] == []
    else:
        assert "WARNING training attention=dense device=cuda FALLBACK" in line
        assert "shared memory" in line
