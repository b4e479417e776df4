"""Draws and verification: exact distributions, independent rows, and a test that a broken
verifier fails.
"""

import pytest
import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.model.sampling import UniformStream, choose_tokens, distribution, draw, verify_tokens

GREEDY, PLAIN = SamplingConfig(temperature=0), SamplingConfig(temperature=1.0)


def test_filters_keep_what_they_say() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = {
        "top_k": (SamplingConfig(temperature=1, top_k=2), [2 / 3, 1 / 3, 0.0, 0.0]),
        # the token that crosses 0.6 stays
        "top_p": (SamplingConfig(temperature=1, top_p=0.6), [2 / 3, 1 / 3, 0.0, 0.0]),
        "top_p_tiny": (SamplingConfig(temperature=1, top_p=1e-6), [1.0, 0.0, 0.0, 0.0]),
        "min_p": (SamplingConfig(temperature=1, min_p=0.3), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        "temperature": (
            SamplingConfig(temperature=0.5),
            [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345],
        ),
    }
    for name, (sampling, wanted) in kept.items():
        torch.testing.assert_close(distribution(logits, sampling), torch.tensor([wanted]), msg=name)


def test_at_temperature_0_the_first_of_the_largest_logits_is_taken() -> None:
    tokens, probs = choose_tokens(torch.tensor([[0.5, 0.7, 0.7]]), GREEDY, torch.tensor([0.9]))
    assert (tokens.tolist(), probs) == ([1], None)


def test_filters_agree_with_transformers() -> None:
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    sampling = SamplingConfig(temperature=0.7, top_k=20, top_p=0.8, min_p=0.02)
    scores = logits
    for warp in (
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.02),
    ):
        scores = warp(torch.empty(0), scores)
    torch.testing.assert_close(distribution(logits, sampling), scores.softmax(-1))


def test_a_draw_never_picks_a_token_of_probability_zero() -> None:
    probs = torch.tensor(
        [[0.0, 0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0, 1e-30]]
    )
    edges = torch.tensor([0.0, 1e-300, 0.5, 1 - 2**-53, 1 - 2**-24], dtype=torch.float64)
    for edge in edges:
        tokens = draw(probs, edge.expand(3))
        assert (probs.gather(1, tokens[:, None]) > 0).all()
    assert draw(probs, torch.zeros(3)).tolist() == [1, 2, 0]


def test_a_draw_depends_on_its_own_row_only() -> None:
    generator = torch.Generator().manual_seed(0)
    probs, uniforms = (
        torch.rand(6, 3, 33, generator=generator).softmax(-1),
        torch.rand(6, 3, generator=generator),
    )
    together = draw(probs, uniforms)
    assert all(
        torch.equal(draw(probs[row : row + 1], uniforms[row : row + 1])[0], together[row])
        for row in range(6)
    )


def test_streams_depend_on_their_seed_and_on_how_many_were_taken_only() -> None:
    stream, lone = UniformStream([3, 4]), UniformStream([4])
    taken = torch.cat([stream.take(n) for n in (1, 7, 300, 500, 2)], 1)
    assert torch.equal(taken[1:], lone.take(810))
    assert (taken >= 0).all() and (taken < 1).all()
    kept = stream.take(3)
    before = kept.clone()
    first, nine = stream.start([0], [9]), UniformStream([9]).take(601)[0]
    assert torch.equal(kept, before)
    assert torch.equal(torch.cat([first, stream.take(600)[0]]), nine)
    assert torch.equal(stream.take(1)[1:], UniformStream([4]).take(1414)[:, -1:])
    stream.keep([1])
    assert torch.equal(stream.take(5), UniformStream([4]).take(1419)[:, -5:])


def chi_square(counts: Tensor, probs: Tensor) -> float:
    expected = counts.sum() * probs
    return float(((counts - expected) ** 2 / expected).sum())


# 4 tokens have 3 degrees of freedom: a fair verifier exceeds 21.1 once in ten thousand.
LIMIT, ROUNDS, VOCAB = 21.1, 20_000, 4


def verified_tokens(claimed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """First and second token of 20,000 rounds; `claimed` is what verification is told the draft
    drew from.
    """
    generator = torch.Generator().manual_seed(1)
    target = torch.tensor([[2.0, 0.0, 1.0, -1.0], [-1.0, 1.0, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0]])
    q = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.2, 0.2, 0.1]]).expand(ROUNDS, 2, VOCAB)
    tokens = draw(q, torch.rand(ROUNDS, 2, generator=generator))
    told = q if claimed is None else claimed.expand(ROUNDS, 2, VOCAB)
    verdict = verify_tokens(
        tokens,
        told,
        target.expand(ROUNDS, 3, VOCAB),
        PLAIN,
        torch.rand(ROUNDS, 3, generator=generator),
    )
    first = torch.where(verdict.num_accepted > 0, tokens[:, 0], verdict.next_token)
    second = torch.where(verdict.num_accepted > 1, tokens[:, 1], verdict.next_token)[
        verdict.num_accepted > 0
    ]
    return first, second, target.softmax(-1)


def test_verified_tokens_are_distributed_as_the_targets_own() -> None:
    """Trap E1, 20,000 rounds."""
    first, second, probs = verified_tokens(None)
    assert chi_square(torch.bincount(first, minlength=VOCAB), probs[0]) < LIMIT
    assert chi_square(torch.bincount(second, minlength=VOCAB), probs[1]) < LIMIT


def test_the_chi_square_test_finds_a_verifier_told_another_distribution() -> None:
    """The negative control: a draft distribution that is off by rounding of a few percent must
    be noticed.
    """
    first, _, probs = verified_tokens(torch.tensor([[0.14, 0.38, 0.28, 0.2], [0.5, 0.2, 0.2, 0.1]]))
    assert chi_square(torch.bincount(first, minlength=VOCAB), probs[0]) > LIMIT


def test_greedy_verification_compares_likeliest_tokens() -> None:
    likeliest = torch.tensor([[1, 2, 3], [1, 2, 3], [4, 2, 3]])
    logits = torch.nn.functional.one_hot(likeliest, 5).float()
    verdict = verify_tokens(torch.tensor([[1, 2], [1, 0], [1, 2]]), None, logits, GREEDY, None)
    assert verdict.num_accepted.tolist() == [2, 1, 0]
    assert verdict.next_token.tolist() == [3, 2, 4]


@pytest.mark.parametrize("sampling", [GREEDY, PLAIN])
def test_tokens_behind_the_proposed_ones_are_never_accepted(sampling: SamplingConfig) -> None:
    tokens, logits = (
        torch.tensor([[1, 1], [1, 1]]),
        torch.full((2, 3, 3), -1e9).index_fill_(2, torch.tensor([1]), 0.0),
    )
    probs = distribution(logits[:, :2], PLAIN)
    verdict = verify_tokens(
        tokens, probs, logits, sampling, torch.rand(2, 3), num_proposed=torch.tensor([0, 1])
    )
    assert verdict.num_accepted.tolist() == [0, 1]
    assert verdict.next_token.tolist() == [1, 1]


def test_equal_distributions_accept_everything() -> None:
    logits = torch.randn(64, 4, 9, generator=torch.Generator().manual_seed(2))
    probs = distribution(logits[:, :3], PLAIN)
    tokens = draw(probs, torch.rand(64, 3))
    assert (verify_tokens(tokens, probs, logits, PLAIN, torch.rand(64, 4)).num_accepted == 3).all()


def test_two_seeds_differ_at_temperature_one() -> None:
    """Trap E3: sampling that has silently become greedy."""
    probs = torch.full((1, 5, 50), 0.02)
    drawn = [draw(probs, UniformStream([seed]).take(5)).tolist() for seed in (0, 1)]
    assert drawn[0] != drawn[1]
