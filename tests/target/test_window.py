"""Sliding-window layers keep a window of keys and values, and nothing that is computed changes."""

from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, Qwen3Config, Qwen3ForCausalLM

from deepspec.config.data import SamplingConfig
from deepspec.evaluate.speculate import speculate
from deepspec.model.kv_cache import SPARE
from deepspec.target.generate import Decode, generate, prefill
from deepspec.target.model import Target
from tests.evaluate.test_speculate import Scripted
from tests.target.test_conformance import SIZES, tiny_gemma4

WINDOW = 16
LONG = {**SIZES, "max_position_embeddings": 256}


def sliding_qwen3() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        **LONG,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
    )
    return Qwen3ForCausalLM(config)


TARGETS = {"gemma4": tiny_gemma4, "qwen3": sliding_qwen3}


def some_tokens(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 97, (length,), generator=generator).tolist() for length in lengths]


def assert_as_without_a_cache(target: Target, starts: list[int], widths: list[int]) -> None:
    """Rows with prompts of lengths `starts` take `widths` tokens at a time, and keep some of them:
    another number in each row, the whole in one of them.
    """
    rows = some_tokens(*(start + sum(widths) for start in starts))
    cache = target.new_cache(len(rows), 120)
    prefill(target, cache, [row[:start] for row, start in zip(rows, starts, strict=True)])
    for number, width in enumerate(widths):
        lengths = list(cache.lengths)
        new = [row[length : length + width] for row, length in zip(rows, lengths, strict=True)]
        output = target.forward(torch.tensor(new), cache)
        for row, length in enumerate(lengths):
            alone = target.forward(torch.tensor([rows[row][: length + width]]))
            torch.testing.assert_close(
                output.last_hidden[row], alone.last_hidden[0, length:], atol=2e-5, rtol=1e-4
            )
        cache.lengths = [
            length + max(1, width - 3 * ((row + number) % len(rows)))
            for row, length in enumerate(lengths)
        ]
    assert max(cache.lengths) > WINDOW + SPARE


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("starts", "widths"),
    [
        ([6, 3, 8], [8] * 10),
        ([70, 3, 30], [1, 8, 2, 8, 8]),
        ([90, 90], [8, 8, 1]),
        ([60], [1, 8, 8, 1, 8]),
        ([20, 40, 7], [8, 45, 8, 1]),  # more at a time than a window's slots have room for
    ],
)
def test_rows_taken_back_see_their_window(name: str, starts: list[int], widths: list[int]) -> None:
    assert_as_without_a_cache(Target(TARGETS[name](), (0, 2)), starts, widths)


@pytest.mark.parametrize("name", TARGETS)
def test_greedy_answers_beyond_the_window_are_those_of_transformers(name: str) -> None:
    target = Target(TARGETS[name](), (0, 2))
    prompts = some_tokens(6, 61, 33, 3, 20)
    settings = Decode(SamplingConfig(temperature=0), 60, {96}, batch_size=2)
    answers = generate(target, prompts, settings, seeds=[0] * 5)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = target.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=60,
            do_sample=False,
            eos_token_id=96,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()
    assert max(len(answer) for answer in answers) > WINDOW + SPARE


@pytest.mark.parametrize("right", [0, 2, 4])
def test_speculative_answers_beyond_the_window_are_the_plain_ones(right: int) -> None:
    """Whatever the target rejects: all of a block, a part of it, nothing."""
    target = Target(sliding_qwen3(), (0, 2))
    prompts = some_tokens(6, 61, 33, 3, 20)
    settings = Decode(SamplingConfig(temperature=0), 60, {96}, batch_size=2)
    plain = generate(target, prompts, settings, seeds=[0] * 5)
    draft: Any = Scripted(prompts, plain, right)
    traces, _ = speculate(target, draft, prompts, settings, seeds=[0] * 5)
    assert [trace.token_ids for trace in traces] == plain


# The geometries of Gemma4-12B (an eighth of its layers) and Qwen3-8B (a ninth), in bfloat16.
GEMMA4_12B = {
    "vocab_size": 262_144,
    "hidden_size": 3840,
    "intermediate_size": 15_360,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "max_position_embeddings": 131_072,
}
QWEN3_8B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}


def at_real_size(name: str) -> Target:
    """Without weights: on the device that computes shapes alone."""
    with torch.device("meta"):
        if name == "gemma4":
            model = Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA4_12B))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**QWEN3_8B))
    return Target(model.bfloat16(), (0,))


@pytest.mark.parametrize(
    ("name", "full", "sliding"),
    [  # bytes of a token in the layers that see all, and in those with a window
        ("gemma4", 1 * 2 * 1 * 512 * 2, 5 * 2 * 8 * 256 * 2),
        ("qwen3", 4 * 2 * 8 * 128 * 2, 0),
    ],
)
def test_a_cache_takes_the_bytes_that_its_rows_need(name: str, full: int, sliding: int) -> None:
    """Each layer held all of rows x (longest prompt + max_new_tokens) from its first token on:
    134 GB for 64 rows of Gemma4-12B, of which a window leaves 29.
    """
    target, rows, prompt, capacity = at_real_size(name), 64, 2000, 6096
    cache = target.new_cache(rows, capacity)
    target.forward(torch.zeros(rows, prompt, dtype=torch.long, device="meta"), cache)
    cache.lengths = [prompt] * rows
    window = 1024 + SPARE
    assert cache.num_bytes == rows * (3000 * full + window * sliding)
    for length in (3000, 4500, capacity - 1):
        cache.lengths = [length] * rows
        target.forward(torch.zeros(rows, 1, dtype=torch.long, device="meta"), cache)
    assert cache.num_bytes == rows * (capacity * full + window * sliding)
    assert cache.num_bytes == rows * target.row_bytes(capacity)
    assert target.row_bytes(100) == 100 * (full + sliding)
