"""The summary of a result: every benchmark by itself, micro and macro named (trap E7), speed at
each batch size (trap E6).
"""

import json
import math

import numpy as np
import pytest

from deepspec.artifacts.results import EvaluationSummary, Losslessness, read_summary
from deepspec.evaluate.results import compute_summary, read_rows
from deepspec.evaluate.summary import GAP_BOUND, losslessness, summarise
from deepspec.storage.store import pretty_json
from tests.conftest import tiny_run
from tests.evaluate.made_results import made_calibration, made_rows, made_scheduler, put_result


def test_micro_pools_rounds_and_macro_averages_benchmarks():
    few = made_rows(benchmarks={"gsm8k": ("math", 0.9)}, prompts=2)
    many = made_rows(benchmarks={"alpaca": ("chat", 0.4)}, prompts=30)
    found = summarise([*few, *many])
    lengths = {part.benchmark: part.acceptance_length for part in found.benchmarks}
    assert found.acceptance_length == {
        "macro": pytest.approx(np.mean(list(lengths.values()))),
        **lengths,
    }
    committed = sum(sum(row["committed"]) for row in [*few, *many])
    rounds = sum(len(row["committed"]) for row in [*few, *many])
    assert found.micro.acceptance_length == committed / rounds
    assert found.micro.acceptance_length < found.macro.acceptance_length, (
        "the many prompts are the worse ones"
    )


def test_domains_are_told_apart():
    rows = made_rows(
        benchmarks={"gsm8k": ("math", 0.9), "math500": ("math", 0.8), "alpaca": ("chat", 0.5)}
    )
    domains = {part.domain: part for part in summarise(rows).domains}
    assert domains["math"].benchmarks == ["gsm8k", "math500"]
    assert domains["math"].acceptance_length > domains["chat"].acceptance_length


def test_every_number_lies_in_its_interval():
    found = summarise(made_rows())
    for part in [*found.benchmarks, *found.domains, found.micro, found.macro]:
        for name in ("acceptance_length", "verify_rate", "speedup"):
            low, high = getattr(part.intervals, name)
            assert low <= getattr(part, name) <= high
    for name in ("prefix_acceptance", "conditional_acceptance"):
        for value, (low, high) in zip(
            getattr(found.micro, name), getattr(found.micro.intervals, name), strict=True
        ):
            assert low <= value <= high


def test_acceptance_is_of_the_first_batch_size_and_speed_of_each():
    one, both = summarise(made_rows()), summarise(made_rows(batch_sizes=[1, 4, 8]))
    assert both.acceptance_length == one.acceptance_length
    assert (both.prompts, both.rounds) == (one.prompts, one.rounds)
    sizes = both.benchmarks[0].batch_sizes
    assert [(size.batch_size, size.groups, size.prompts) for size in sizes] == [
        (1, 24, 24),
        (4, 6, 24),
        (8, 3, 24),
    ]
    assert len({size.speedup for size in sizes}) == 3
    assert both.speedup == both.batch_sizes[0].speedup


def test_an_answer_that_only_a_larger_batch_gets_wrong_is_told():
    """Losslessness was looked at in the first batch size alone: a broken batched decoder was
    reported as lossless.
    """
    rows = [
        {**row, "identical": row["batch_size"] == 1, "regret": None}
        for row in made_rows(batch_sizes=[1, 4])
    ]
    found = summarise([{**row, "temperature": 0.0} for row in rows], dtype="float32")
    assert found.losslessness.ok is False
    assert found.lossless == (len(rows) // 2, len(rows))


def test_the_seconds_of_the_phases_are_those_of_the_whole():
    seconds = summarise(made_rows()).seconds
    phases = seconds.draft_seconds + seconds.verify_seconds + seconds.bookkeeping_seconds
    assert phases == pytest.approx(seconds.seconds)
    assert seconds.bookkeeping_seconds == pytest.approx(0.1 * seconds.seconds)


def test_a_single_prompt_has_numbers_but_no_intervals():
    found = summarise(made_rows(benchmarks={"gsm8k": ("math", 0.9)}, prompts=1))
    assert found.macro.acceptance_length > 1
    assert found.macro.intervals.model_dump() == {
        "acceptance_length": None,
        "verify_rate": None,
        "speedup": None,
    }
    assert found.intervals.acceptance_length is None
    assert found.intervals.prefix_acceptance == [None] * 7


def test_an_answer_without_a_round_counts_for_nothing():
    empty = {"proposed": [], "accepted": [], "committed": [], "num_tokens": 1, "plain_tokens": 1}
    rows = [{**row, **empty} for row in made_rows(prompts=2)]
    found = summarise(rows)
    assert (found.rounds, found.micro.acceptance_length, found.acceptance_length["macro"]) == (
        0,
        0.0,
        0.0,
    )
    assert found.intervals.acceptance_length is None


@pytest.mark.parametrize(
    ("temperature", "dtype", "identical", "regrets", "ok", "said"),
    [
        (0.0, "float32", [True, True], [None, None], True, "token for token"),
        (0.0, "float32", [True, False], [None, 0.01], False, "in float32 none may"),
        (0.0, "bfloat16", [True, False], [None, GAP_BOUND / 2], True, "by ties"),
        (0.0, "bfloat16", [True, False], [None, GAP_BOUND * 4], False, "by more than ties"),
        (0.0, "bfloat16", [True, False], [None, None], None, "not recorded"),
        (0.0, "float16", [True, False], [None, GAP_BOUND / 2], True, "by ties"),
        (0.0, "bfloat16", [True, False], [None, math.inf], False, "by more than ties"),
        (1.0, "float32", [False, False], [None, None], None, "distributed as the target's"),
    ],
)
def test_losslessness_is_claimed_as_far_as_the_counts_show_it(
    temperature, dtype, identical, regrets, ok, said
):
    rows = [
        {"identical": same, "regret": regret}
        for same, regret in zip(identical, regrets, strict=True)
    ]
    found = losslessness(rows, temperature, dtype)
    assert found.ok is ok
    assert said in found.words


@pytest.mark.parametrize(("num_large", "ok"), [(0, True), (1, True), (2, False)])
def test_one_large_gap_in_twenty_is_rounding_and_two_are_not(num_large: int, ok: bool):
    """The largest of a million tokens' gaps was judged before, which passes any bound by chance."""
    gaps = [GAP_BOUND * 4] * num_large + [GAP_BOUND / 4] * (20 - num_large)
    rows = [{"identical": False, "regret": gap} for gap in gaps]
    rows += [{"identical": True, "regret": None}] * 300
    found = losslessness(rows, 0.0, "bfloat16")
    assert found.ok is ok
    assert found.max_logit_gap == max(gaps)
    assert found.usual_logit_gap == (GAP_BOUND / 4 if ok else GAP_BOUND * 4)


def test_an_older_summary_has_no_usual_gap():
    document = losslessness([{"identical": True}], 0.0, "bfloat16").model_dump(by_alias=True)
    del document["usual_logit_gap"]
    assert Losslessness.model_validate(document).usual_logit_gap is None


OLD = ("batch_size", "group", "domain", "turn", "regret", "confidence")


def test_a_result_of_an_older_version_is_read_as_one_of_batch_size_1(tmp_path):
    rows = made_rows(benchmarks={"math": ("math", 0.9), "mine": ("math", 0.9)}, prompts=3)
    artifact = put_result(tiny_run(tmp_path), rows, without=OLD)
    found = read_rows(artifact)
    assert {row["batch_size"] for row in found} == {1}
    assert {row["benchmark"]: row["domain"] for row in found} == {"math": "math", "mine": "other"}
    summary = compute_summary(artifact, found)
    assert read_summary(artifact) == summary
    assert summary.losslessness.dtype == "float32"


def test_a_summary_is_the_same_document_whatever_parts_it_has(tmp_path):
    rows = made_rows(prompts=3, batch_sizes=[1, 2], temperatures=[0.0, 1.0])
    summary = summarise(rows)
    whole = {"calibration": made_calibration(), "scheduler": made_scheduler()}
    for found in (summary, summary.model_copy(update=whole)):
        document = json.loads(pretty_json(found.to_json()))
        assert ("scheduler" in document) == (found.scheduler is not None)
        assert EvaluationSummary.model_validate(document).to_json() == document
    assert document["losslessness"]["max_regret"] is None
    assert set(document["temperatures"]) == {"0.0", "1.0"}
    assert document["lossless"] == [18, 18]
