"""The prefix scheduler: Algorithm 1 against a walk step by step, and that no policy changes
what the target would say.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from deepspec.config.data import SamplingConfig
from deepspec.evaluate.confidence import simulate
from deepspec.evaluate.rounds import read_rounds
from deepspec.evaluate.scheduler import Fixed, Policy, Scheduled, Threshold, schedule
from deepspec.evaluate.speed_curve import SpeedCurve
from deepspec.model.drafter import Proposal
from deepspec.model.sampling import verify_tokens
from tests.evaluate.made_rounds import made_rows
from tests.model.drafts import CONFIGS, make_batch, make_draft

FLAT = SpeedCurve([1, 1000], [10.0, 10.0])
STAIRS = SpeedCurve([1, 2, 3, 4, 5, 6, 7], [1.0, 0.7, 0.69, 0.5, 0.49, 0.4, 0.39])


def walk(confidence: np.ndarray, curve: SpeedCurve) -> list[int]:
    """Algorithm 1 word for word, one admission at a time."""
    requests, block_size = confidence.shape
    lengths, survival, expected, tokens = (
        [0] * requests,
        np.ones(requests),
        float(requests),
        requests,
    )
    while True:
        chances = [
            s * confidence[r, n] if n < block_size else -1.0
            for r, (s, n) in enumerate(zip(survival, lengths, strict=True))
        ]
        best = int(np.argmax(chances))
        if chances[best] < 0 or (expected + chances[best]) * curve(tokens + 1) <= expected * curve(
            tokens
        ):
            return lengths
        survival[best], lengths[best] = chances[best], lengths[best] + 1
        expected, tokens = expected + chances[best], tokens + 1


def any_curve(rng: np.random.Generator, most: int) -> SpeedCurve:
    """Stairs of random heights: some tokens cost nothing, others much."""
    return SpeedCurve(
        range(1, most + 1),
        1 / (1 + np.cumsum(rng.exponential(0.3, most) * (rng.random(most) < 0.5))),
    )


def test_one_request_by_hand():
    """tau * SPS: 1 * 1.0, 1.9 * 0.8 = 1.52, 2.71 * 0.6 = 1.63, and 3.44 * 0.4 = 1.38 does not
    improve.
    """
    curve = SpeedCurve([1, 2, 3, 4], [1.0, 0.8, 0.6, 0.4])
    assert schedule(np.full((1, 3), 0.9), curve).tolist() == [2]


def test_the_surer_request_gets_more():
    curve = SpeedCurve([1, 2, 3, 4, 5, 6], [1.0, 1.0, 0.9, 0.8, 0.5, 0.4])
    assert schedule(np.array([[0.95, 0.9], [0.3, 0.9]]), curve).tolist() == [2, 0]


def test_where_tokens_cost_nothing_all_are_verified_and_where_they_cost_in_proportion_none():
    confidence = np.full((3, 4), 0.5)
    assert schedule(confidence, FLAT).tolist() == [4, 4, 4]
    assert schedule(confidence, SpeedCurve([1], [10.0])).tolist() == [0, 0, 0]
    # a token that is never accepted improves nothing
    assert schedule(np.zeros((2, 3)), FLAT).tolist() == [0, 0]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_it_admits_what_a_walk_step_by_step_admits(ties: bool):
    rng = np.random.default_rng(2)
    for _ in range(300):
        requests, block_size = rng.integers(1, 6), rng.integers(1, 6)
        shape = (requests, block_size)
        confidence = rng.choice([0.25, 0.5, 1.0], shape) if ties else rng.uniform(0.05, 1.0, shape)
        curve = any_curve(rng, int(requests * (block_size + 1)))
        assert schedule(confidence, curve).tolist() == walk(confidence, curve)


def test_where_each_further_token_costs_more_no_choice_of_prefixes_is_better():
    rng = np.random.default_rng(3)
    for _ in range(50):
        confidence = rng.uniform(0.05, 1.0, (3, 3))
        survival = np.cumprod(confidence, axis=1)
        seconds = 1 + np.cumsum(np.sort(rng.exponential(0.1, 12)))
        curve = SpeedCurve(range(1, 13), 1 / seconds)

        def value(
            lengths: tuple[int, ...], survival: np.ndarray = survival, curve: SpeedCurve = curve
        ) -> float:
            expected = 3 + sum(survival[r, :n].sum() for r, n in enumerate(lengths))
            return float(expected * curve(3 + sum(lengths)))

        best = max(value(lengths) for lengths in itertools.product(range(4), repeat=3))
        assert value(tuple(schedule(confidence, curve).tolist())) == pytest.approx(best)


def test_a_disturbed_measurement_costs_nothing_once_it_is_smoothed():
    """The scheduler believes a curve with noise, steps take what they truly take."""
    rng, tokens = np.random.default_rng(7), np.array([1, 2, 4, 8, 16, 32, 64, 128])
    true, rounds = (
        SpeedCurve(tokens, 1 / (5 + 0.15 * tokens)),
        read_rounds(made_rows(20, 50, temperatures=(1.0,) * 7), 7),
    )
    best = {
        number: max(simulate(rounds, Fixed(k), true, requests=number).throughput for k in range(8))
        for number in (2, 8)
    }
    reached: dict[str, list[float]] = {"measured": [], "smooth": []}
    for _ in range(6):
        measured = SpeedCurve(
            tokens, true(tokens) * np.exp(-np.abs(rng.normal(0, 0.3, len(tokens))))
        )
        for name, curve in (("measured", measured), ("smooth", measured.smooth())):
            reached[name] += [
                simulate(rounds, Scheduled(curve), true, requests=number).throughput / best[number]
                for number in best
            ]
    assert min(reached["smooth"]) > 0.98 > min(reached["measured"])


# Losslessness, by enumeration: two slots, three tokens of output, the confidence of slot 2 follows
# from the token in slot 1.


class Request(NamedTuple):
    """Conditional distributions by the tokens before, and the draft's confidences given its
    whole draft.
    """

    draft: dict[tuple[int, ...], np.ndarray]
    target: dict[tuple[int, ...], np.ndarray]
    confidence: Callable[[tuple[int, ...]], list[float]]

    def drafts(self) -> list[tuple[tuple[int, ...], float]]:
        tokens = range(len(self.draft[()]))
        return [((a, b), self.draft[()][a] * self.draft[(a,)][b]) for a in tokens for b in tokens]

    def spoken(self, before: tuple[int, ...] = ()) -> np.ndarray:
        """What the target says on its own: probability of each three tokens, as an array of
        three axes.
        """
        found = np.zeros((len(self.target[()]),) * 3)
        if len(before) == 3:
            found[before] = 1.0
            return found
        for token, chance in enumerate(self.target[before]):
            found += chance * self.spoken((*before, token))
        return found

    def verified(
        self, drafted: tuple[int, ...], length: int, before: tuple[int, ...] = ()
    ) -> np.ndarray:
        """What comes out when the first `length` drafted tokens are verified and the target
        goes on from there.
        """
        place = len(before)
        if place == length:
            return self.spoken(before)
        p, q, token = self.target[before], self.draft[before], drafted[place]
        accepted = min(1.0, p[token] / q[token])
        rest = np.maximum(p - q, 0)
        found = accepted * self.verified(drafted, length, (*before, token))
        for other in np.flatnonzero(rest if accepted < 1 else 0):
            found = found + (1 - accepted) * rest[other] / rest.sum() * self.spoken(
                (*before, int(other))
            )
        return found


def a_request(rng: np.random.Generator, vocabulary: int = 2) -> Request:
    def some() -> np.ndarray:
        return rng.dirichlet(np.ones(vocabulary))

    first = [(token,) for token in range(vocabulary)]
    both = [(*one, token) for one in first for token in range(vocabulary)]
    sure = rng.uniform(0.1, 1.0, 1 + vocabulary)
    drafts, targets = (
        {key: some() for key in [(), *first]},
        {key: some() for key in [(), *first, *both]},
    )
    return Request(drafts, targets, lambda drafted: [sure[0], sure[1 + drafted[0]]])


Rule = Callable[[np.ndarray], np.ndarray]


def bias(requests: list[Request], rule: Rule) -> float:
    """Total variation between the joint distribution of all requests' outputs and that of the
    target alone.
    """
    found: np.ndarray | float = 0.0
    for drawn in itertools.product(*(request.drafts() for request in requests)):
        drafts, chances = zip(*drawn, strict=True)
        lengths = rule(
            np.array(
                [
                    request.confidence(drafted)
                    for request, drafted in zip(requests, drafts, strict=True)
                ]
            )
        )
        outputs = [
            request.verified(*each)
            for request, *each in zip(requests, drafts, lengths.tolist(), strict=True)
        ]
        found = found + np.prod(chances) * joint(outputs)
    return float(np.abs(found - joint([request.spoken() for request in requests])).sum() / 2)


def joint(parts: list[np.ndarray]) -> np.ndarray:
    whole = parts[0]
    for part in parts[1:]:
        whole = np.multiply.outer(whole, part)
    return whole


def without_the_early_stop(curve: SpeedCurve) -> Rule:
    """The best total over all admissions in descending survival, wherever it lies."""

    def lengths(confidence: np.ndarray) -> np.ndarray:
        requests, block_size = confidence.shape
        survival = np.cumprod(confidence, axis=1).ravel()
        order = np.argsort(-survival, kind="stable")
        expected = requests + np.concatenate([[0], np.cumsum(survival[order])])
        best = int(np.argmax(expected * curve(requests + np.arange(len(expected)))))
        return np.bincount(order[:best] // block_size, minlength=requests)

    return lengths


def everyone(policy: Policy) -> Rule:
    return lambda confidence: policy(confidence, np.ones(len(confidence), dtype=bool))


@pytest.mark.parametrize("requests", [1, 2])
def test_the_early_stop_leaves_the_targets_distribution_as_it_is(requests: int):
    rng = np.random.default_rng(4)
    biases, adapted = [], 0
    for _ in range(40):
        rule, chosen = (
            everyone(Scheduled(any_curve(rng, 3 * requests), temperatures=(1.5, 0.7))),
            set(),
        )

        def seen(
            confidence: np.ndarray, rule: Rule = rule, chosen: set[tuple[int, ...]] = chosen
        ) -> np.ndarray:
            lengths = rule(confidence)
            chosen.add(tuple(lengths.tolist()))
            return lengths

        biases.append(bias([a_request(rng) for _ in range(requests)], seen))
        adapted += len(chosen) > 1
    assert max(biases) < 1e-12
    assert adapted >= 5  # lengths did follow from drafted tokens


@pytest.mark.parametrize("requests", [1, 2])
def test_a_search_beyond_the_early_stop_biases_what_comes_out(requests: int):
    """Appendix A: no slot pays alone, two do where the second is sure, and whether it is
    follows from the first token.
    """
    rng = np.random.default_rng(5)
    for _ in range(10):
        sure = float(rng.uniform(0.3, 0.7))
        batch = [
            a_request(rng)._replace(
                confidence=lambda drafted, sure=sure: [sure, 0.05 if drafted[0] else 1.0]
            )
            for _ in range(requests)
        ]
        dear, cheap = 1.4 * sure / requests, 0.01
        curve = SpeedCurve(
            range(1, 3 * requests + 1),
            1 / np.cumsum([1.0] + [0.0] * (requests - 1) + [dear, cheap] * requests),
        )
        # exact arithmetic: anything above rounding is a bias
        assert bias(batch, without_the_early_stop(curve)) > 1e-4
        assert bias(batch, everyone(Scheduled(curve))) < 1e-12


def test_a_threshold_and_a_whole_block_leave_it_as_it_is():
    rng = np.random.default_rng(5)
    for _ in range(20):
        batch = [a_request(rng, vocabulary=3)]
        assert bias(batch, everyone(Threshold(0.6))) < 1e-12
        assert bias(batch, everyone(Fixed(2))) < 1e-12


@pytest.mark.parametrize(
    "policy",
    [Scheduled(SpeedCurve([1, 2, 3], [1.0, 0.6, 0.4])), Threshold(0.5)],
    ids=["scheduled", "threshold"],
)
def test_the_condition_a_confidence_that_looks_at_its_own_token_biases_every_policy(
    policy: Scheduled | Threshold,
):
    """As the draft's own probability of the token would: a likely token is verified, and an
    unlikely one never comes out.
    """
    sound = a_request(np.random.default_rng(6))
    likely = int(np.argmax(sound.draft[()]))
    looking = sound._replace(confidence=lambda drafted: [0.9 if drafted[0] == likely else 0.1, 0.1])
    assert bias([looking], everyone(policy)) > 0.02
    assert bias([sound], everyone(policy)) < 1e-12


@pytest.mark.parametrize(
    "name",
    [name for name in CONFIGS if CONFIGS[name].algorithm == "dspark" and CONFIGS[name].confidence],
)
def test_the_condition_holds_for_every_draft_with_a_confidence_head(name: str):
    """Drawn anew from slot j on, a block has the same confidences up to and including slot j's."""
    draft, batch = make_draft(CONFIGS[name]), make_batch((12,))
    cache, sampling = draft.new_cache(1, 12), SamplingConfig(temperature=1.0)
    draft.extend(cache, batch.context[None], batch.input_ids[None], [12])

    def propose(uniforms: torch.Tensor) -> Proposal:
        return draft.propose(cache, batch.input_ids[-1:], sampling, uniforms)

    one, other = torch.full((1, 4), 0.1), torch.full((1, 4), 0.9)
    whole = propose(one)
    for slot in range(4):
        again = propose(torch.cat([one[:, :slot], other[:, slot:]], dim=1))
        assert whole.confidence is not None and again.confidence is not None
        assert again.tokens[0, slot] != whole.tokens[0, slot]
        assert torch.equal(again.confidence[:, : slot + 1], whole.confidence[:, : slot + 1])


@pytest.mark.parametrize("early_stop", [True, False])
def test_appendix_a_through_real_verification(early_stop: bool):
    """Slot 1 alone does not pay, slots 1 and 2 do where slot 2 is sure; and whether it is sure
    follows from token 1.

    tau * SPS is 1.0, 1.6 * 0.6 = 0.96, and 2.2 * 0.59 = 1.30 or 1.66 * 0.59 = 0.98. So the search
    beyond the early stop verifies a block only where it begins with token 0.
    """
    curve, rounds = SpeedCurve([1, 2, 3], [1.0, 0.6, 0.59]), 20_000
    draft, target = torch.tensor([0.5, 0.5]), torch.tensor([0.7, 0.3])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.multinomial(draft, rounds * 2, replacement=True, generator=generator).reshape(
        rounds, 2
    )
    sure = np.array([[0.6, 1.0], [0.6, 0.1]])  # by the first token
    rule = everyone(Scheduled(curve)) if early_stop else without_the_early_stop(curve)
    lengths = torch.tensor([int(rule(row[None])[0]) for row in sure])
    assert lengths.tolist() == ([0, 0] if early_stop else [2, 0])
    verdict = verify_tokens(
        tokens,
        draft.expand(rounds, 2, 2),
        target.log().expand(rounds, 3, 2),
        SamplingConfig(temperature=1.0),
        torch.rand(rounds, 3, generator=generator),
        lengths[tokens[:, 0]],
    )
    first = torch.where(verdict.num_accepted > 0, tokens[:, 0], verdict.next_token)
    counts = torch.bincount(first, minlength=2)
    chi_square = float(((counts - rounds * target) ** 2 / (rounds * target)).sum())
    assert (chi_square < 10.83) == early_stop  # 0.1 % of one degree of freedom


# The seam to the batched decoder


def test_requests_that_have_ended_take_no_part():
    confidence = np.array([[0.9, 0.9], [0.99, 0.99], [0.8, 0.3]])
    running = np.array([True, False, True])
    assert Fixed(2)(confidence, running).tolist() == [2, 0, 2]
    assert Threshold(0.5)(confidence, running).tolist() == [2, 0, 1]
    alone = schedule(confidence[running], STAIRS).tolist()
    assert Scheduled(STAIRS)(confidence, running).tolist() == [alone[0], 0, alone[1]]
    assert Scheduled(STAIRS)(confidence, np.zeros(3, dtype=bool)).tolist() == [0, 0, 0]


def test_temperatures_come_before_the_cut():
    confidence, running = np.array([[0.8, 0.8]]), np.array([True])
    assert Threshold(0.7)(confidence, running).tolist() == [2]
    assert Threshold(0.7, temperatures=(1.0, 3.0))(confidence, running).tolist() == [1]
    curve = SpeedCurve([1, 2, 3], [1.0, 0.6, 0.4])
    assert Scheduled(curve)(confidence, running).tolist() == [1]
    assert Scheduled(curve, temperatures=(5.0, 1.0))(confidence, running).tolist() == [0]
