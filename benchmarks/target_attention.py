"""Attention of a target over a cache: transformers' own against ours, which copies no keys.

A pass goes through some layers with caches of their own and one mask, as in decoding: one query a
row is plain decoding, eight are verification of a block of seven. 32 heads share 8 keys and values
of 128, as in Qwen3-4B and -8B; 4 share 2 of 32, as in the demo's target.
"""

import json
import time
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks._measure import alternate, result
from deepspec.target.attention import KeyMask, grouped_attention

BLOCK = 7
CASES = {  # layers, heads, key-value heads, head dimension, rows, keys
    "Qwen3": (4, 32, 8, 128, 1, 2000),
    "Qwen3, 4 rows": (4, 32, 8, 128, 4, 2000),
    "demo": (12, 4, 2, 32, 1, 300),
    "demo, 8 rows": (12, 4, 2, 32, 8, 300),
}
GOALS = {
    f"transformers/ours, {name}, {queries} a row": goal
    for name in CASES
    for queries, goal in (("1 query", 0.9), (f"{BLOCK + 1} queries", 1.2))
}


def compare(shape: Sequence[int], num_queries: int) -> dict[str, float]:
    """Processor seconds of a pass by each side, one thread, the outputs compared."""
    layers, heads, groups, size, rows, num_keys = shape
    torch.manual_seed(0)
    layer = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    queries = torch.randn(rows, num_queries, heads, size).transpose(1, 2)
    room = (rows, groups, num_keys + 500, size)
    caches = [[torch.randn(room)[:, :, :num_keys] for _ in range(2)] for _ in range(layers)]
    seen = torch.arange(num_keys - num_queries, num_keys)[:, None] >= torch.arange(num_keys)
    visible = seen.expand(rows, 1, -1, -1).contiguous()

    def ours() -> list[Tensor]:
        mask = KeyMask(visible)
        calls = (
            grouped_attention(layer, queries, keys, values, mask, scaling=0.1)
            for keys, values in caches
        )
        return [output for output, _ in calls]

    def theirs() -> list[Tensor]:
        calls = (
            sdpa_attention_forward(layer, queries, keys, values, visible, scaling=0.1)
            for keys, values in caches
        )
        return [output for output, _ in calls]

    for mine, other in zip(ours(), theirs(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)

    def seconds(side) -> float:
        started = time.process_time()
        side()
        return time.process_time() - started

    sides = {"ours": lambda: seconds(ours), "theirs": lambda: seconds(theirs)}
    return alternate(sides, rounds=9)


@torch.inference_mode()
def main() -> dict[str, object]:
    torch.set_num_threads(1)
    found = [compare(shape, queries) for shape in CASES.values() for queries in (1, BLOCK + 1)]
    ratios = [medians["theirs"] / medians["ours"] for medians in found]
    micros = {
        name: round(1e6 * medians["ours"]) for name, medians in zip(GOALS, found, strict=True)
    }
    return result(
        "target_attention", dict(zip(GOALS, ratios, strict=True)), GOALS, microseconds_ours=micros
    )


if __name__ == "__main__":
    print(json.dumps(main()))
