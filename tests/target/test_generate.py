"""Plain decoding: greedy as transformers, drawn by each prompt's own seed."""

import torch

from deepspec.config.data import SamplingConfig
from deepspec.target.generate import Decode, generate
from deepspec.target.model import Target
from tests.target.tiny_target import PROMPTS


def test_greedy_answers_are_those_of_transformers(target: Target):
    settings = Decode(SamplingConfig(temperature=0), 12, {3})
    answers = generate(target, PROMPTS, settings, seeds=[0, 0, 0])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = target.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=3,
            pad_token_id=0,
        )
        assert answer == expected[0, len(prompt) :].tolist()


def test_a_drawn_answer_depends_on_its_own_seed_and_not_on_its_batch(target: Target):
    settings = Decode(SamplingConfig(temperature=1.0, top_k=20), 12, {3})
    together = generate(target, PROMPTS, settings, seeds=[1, 2, 3])
    alone = [
        generate(target, [prompt], settings, seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, (1, 2, 3), strict=True)
    ]
    assert together == alone
    assert generate(target, PROMPTS, settings, seeds=[4, 5, 6]) != together
