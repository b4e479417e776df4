"""Where two answers part, and how far apart the target puts the tokens there."""

import math

import pytest
import torch

from deepspec.evaluate.units import logit_gap
from deepspec.target.model import Target
from tests.target.test_conformance import tiny_gemma4, tiny_qwen3

PROMPT, SHARED = [5, 6, 7], [20, 21]


def logits_after(target: Target, ids: list[int]) -> torch.Tensor:
    return target.logits(target.forward(torch.tensor([ids])).last_hidden[0, -1])


@pytest.mark.parametrize("make", [tiny_qwen3, tiny_gemma4])
def test_the_gap_is_that_of_the_first_tokens_that_differ_and_of_no_later_one(make):
    """Gemma4 caps its logits, and what follows the first difference answers another question."""
    target = Target(make(), (0, 2))
    logits = logits_after(target, [*PROMPT, *SHARED])
    gap = logit_gap(target, PROMPT, [*SHARED, 40, 3], [*SHARED, 50, 60, 61])
    assert gap == pytest.approx(abs(float(logits[40] - logits[50])), abs=1e-5)
    other = logit_gap(target, PROMPT, [*SHARED, 50, 3], [*SHARED, 40])
    assert gap == pytest.approx(other, abs=1e-6)
    assert gap > 0


def test_the_logits_of_a_bfloat16_target_are_compared_in_float32():
    """Rounded to bfloat16, large logits that differ are often equal, or a whole step apart."""
    target = Target(tiny_qwen3().to(torch.bfloat16), (0, 2))
    state = target.forward(torch.tensor([[*PROMPT, *SHARED]])).last_hidden[0, -1].float()
    exact = state @ target.lm_head.weight.float().T
    rounded = logits_after(target, [*PROMPT, *SHARED]).float()
    first, second = exact.topk(2).indices.tolist()
    gap = logit_gap(target, PROMPT, [*SHARED, first], [*SHARED, second])
    assert gap == pytest.approx(float(exact[first] - exact[second]), abs=1e-6)
    assert gap != float((rounded[first] - rounded[second]).abs())


def test_an_answer_that_only_ends_earlier_is_no_tie():
    target = Target(tiny_qwen3(), (0, 2))
    assert logit_gap(target, PROMPT, [20, 21, 22], [20, 21]) == math.inf
