"""Training the target: batches, what is supervised, the schedule, the start."""

import random

import pytest
import torch
from torch.nn import functional as F

from deepspec.config.target import DemoConfig
from deepspec.demo.corpus import make_corpus
from deepspec.demo.stage import encode
from deepspec.demo.target import (
    WARMUP_STEPS,
    Example,
    batch_loss,
    lr_share,
    make_batches,
    new_target,
    train_tokenizer,
)

CONFIG = DemoConfig(
    conversations=60, held_out=2, vocab_size=300, num_layers=2, hidden_size=32, steps=3
)


def examples_of(*lengths: int, domain: str = "math") -> list[Example]:
    return [Example([4] * length, 1, domain) for length in lengths]


def test_every_example_is_in_one_batch_within_the_token_limit():
    examples = [*examples_of(*range(10, 60)), *examples_of(*range(20, 40), domain="code")]
    batches = make_batches(examples, 200, random.Random(0))
    assert sorted(len(example.input_ids) for batch in batches for example in batch) == sorted(
        len(example.input_ids) for example in examples
    )
    assert all(
        len(batch) * max(len(example.input_ids) for example in batch) <= 200 for batch in batches
    )


def test_an_example_longer_than_a_batch_stands_alone():
    assert sorted(map(len, make_batches(examples_of(5, 5, 50), 12, random.Random(0)))) == [1, 2]


def test_a_batch_holds_its_share_of_every_domain():
    examples = [*examples_of(*[10] * 40), *examples_of(*[12] * 20, domain="code")]
    for batch in make_batches(examples, 72, random.Random(0)):
        assert abs(sum(example.domain == "math" for example in batch) - 4) <= 1


def test_the_learning_rate_rises_linearly_and_falls_to_zero():
    rates = [lr_share(step, 100) for step in range(100)]
    assert rates[0] == 1 / WARMUP_STEPS
    assert max(rates) == 1.0
    assert rates.index(1.0) == WARMUP_STEPS - 1
    assert 0 < rates[-1] < 0.001


@pytest.fixture(scope="module")
def tokenizer_and_examples():
    corpus = make_corpus(CONFIG)
    tokenizer = train_tokenizer(
        (row.answer for row in corpus.training), vocab_size=CONFIG.vocab_size
    )
    return tokenizer, [encode(tokenizer, row) for row in corpus.training]


def test_the_loss_is_that_of_the_answers_alone_whatever_the_padding(tokenizer_and_examples):
    """Labels are the answer and its end of turn: the first is predicted from the prompt's last
    token, nothing after the end.
    """
    tokenizer, examples = tokenizer_and_examples
    model = new_target(CONFIG, tokenizer).eval()
    total, count = 0.0, 0
    for ids, prompt, _ in examples[:3]:
        logits = model(torch.tensor([ids])).logits[0]
        total += F.cross_entropy(
            logits[prompt - 1 : -1], torch.tensor(ids[prompt:]), reduction="sum"
        ).item()
        count += len(ids) - prompt
    assert batch_loss(model, examples[:3]).item() == pytest.approx(total / count, rel=1e-5)


def test_the_start_is_the_seeds_alone(tokenizer_and_examples):
    tokenizer, _ = tokenizer_and_examples
    first = new_target(CONFIG, tokenizer).state_dict()
    torch.manual_seed(99)
    again = new_target(CONFIG, tokenizer).state_dict()
    other = new_target(CONFIG.model_copy(update={"seed": 1}), tokenizer).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
