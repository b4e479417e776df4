"""What training compiles on a GPU beside attention, as far as compilers show without one."""

from pathlib import Path

import pytest

from benchmarks._training import QWEN3_4B
from tests.gpu.harness import device_guard, in_child, missing

QWEN3, GEMMA4 = 151_936, 262_144  # their vocabularies
# [vocabulary, cap, Markov rank, terms, dtype]
CASES = {
    "dspark": (QWEN3, None, 256, ["ce", "tv"], "bfloat16"),
    "dflash": (QWEN3, None, 0, ["ce"], "bfloat16"),
    "eagle3": (QWEN3, None, 0, ["soft_ce"], "bfloat16"),
    "exact": (QWEN3, None, 256, ["ce", "tv"], "float32"),
    "gemma4": (GEMMA4, 30.0, 256, ["ce", "tv"], "bfloat16"),
}
SLOTS = [5000, 100, 220, 30_000]  # chunks of 220 and a rest, a small one, a whole one, many
BATCHES = [[1000] * 8, [900, 500], [600, 1200, 300], [800] * 8]  # samples' lengths


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing():
        pytest.skip(reason)
    return device_guard(tmp_path_factory.mktemp("gpu"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_losss_terms_are_two_kernels_whatever_the_number_of_slots(guard: Path) -> None:
    """They were some 45, each of which read and wrote all logits of a chunk: the normalization of
    the target's logits, and all else.
    """
    cases = [[*case, SLOTS] for case in CASES.values()]
    request = {"chip": "sm_90", "cases": cases}
    results = in_child("tests.gpu.compiled_terms", request, guard=guard, timeout_s=900)
    for name, added in zip(CASES, results, strict=True):
        with_gradient, without = added[: len(SLOTS)], added[len(SLOTS) :]
        for first, *others in (with_gradient, without):
            assert len(first) == 2, (name, first)
            assert others == [[]] * len(others), name


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_auto_compiles_a_step_once_for_few_positions_and_once_for_many(guard: Path) -> None:
    """Both passes, at Qwen3-4B's sizes; attention has versions of its own."""
    request = {"chip": "sm_90", "target": QWEN3_4B, "recipe": "dspark-qwen3-4b"}
    request |= {"overrides": ["draft.num_layers=1"], "batches": BATCHES}
    compiles, *made = in_child("tests.gpu.compiled_draft", request, guard=guard, timeout_s=1800)
    assert compiles
    first, second, *others = (
        [name for name in names if "flex_attention" not in name] for names in made
    )
    for part in ("rsqrt", "silu", "softmax"):
        assert any(part in name for name in first)
    assert not any("softmax" in name for name in second)
    assert others == [[], []]
