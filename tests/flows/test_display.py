"""What a run shows at its end: the numbers that the stages and the evaluation wrote."""

import json

import pytest

from deepspec.artifacts.results import (
    BenchmarkMetrics,
    EvaluationSummary,
    MeanMetrics,
    TokensPerSecond,
)
from deepspec.artifacts.status import StageStatus
from flows.display import show_summary, shown_on_terminal, summary_line
from flows.reporting import StageOutcome, prefect_key, report_nothing_to_do, result_row, stage_row

STATUS = StageStatus(
    stage="evaluate",
    artifact_url="/store/evaluate/dspark-demo-1a2b",
    committed=6,
    missing=[],
    rows=1800,
    tokens=50_000,
    rejected_rows=0,
    num_bytes=2_500_000,
    sealed=True,
    failures={},
)
PART = BenchmarkMetrics.model_construct(
    benchmark="math",
    temperature=0.0,
    acceptance_length=4.9,
    conditional_acceptance=[0.91, 0.5],
    speedup=1.66,
    tokens_per_s=TokensPerSecond(plain=180.4, speculative=300.0),
    lossless=(20, 20),
)
RESULTS = EvaluationSummary.model_construct(
    **{**dict(PART), "acceptance_length": {"macro": 3.01, "math": 4.9}},
    macro=MeanMetrics.model_construct(acceptance_length=3.01),
    benchmarks=[PART, PART.model_copy(update={"temperature": 1.0, "lossless": (0, 20)})],
)


def test_a_stage_that_was_done_before_is_said_to_be(capsys: pytest.CaptureFixture[str]):
    with shown_on_terminal(["evaluate"]):
        report_nothing_to_do(STATUS, "already done")
    assert capsys.readouterr().err.startswith("evaluate: already done")


def test_the_summary_names_speed_losslessness_and_every_folder(capsys: pytest.CaptureFixture[str]):
    show_summary([StageOutcome(STATUS, "done", 12.3)], RESULTS)
    shown = capsys.readouterr().out
    for words in (
        "math",
        "4.90",
        "91 50",
        "300",
        "180",
        "1.66",
        "20/20",
        "lossless: 20/20",
        "macro acceptance length 3.01",
        "12.3",
        "2.5",
    ):
        assert words in shown
    assert STATUS.artifact_url in shown


def test_sampled_answers_are_not_compared_token_for_token():
    assert [result_row(part)["lossless"] for part in RESULTS.benchmarks] == ["20/20", ""]


def test_a_stage_already_done_shows_that_instead_of_seconds():
    assert stage_row(StageOutcome(STATUS, "already done", 0.0))["seconds"] == "already done"
    assert stage_row(StageOutcome(STATUS, "done", 3.21))["seconds"] == "3.2"


def test_the_last_line_is_one_json_object_for_scripts():
    line = json.loads(summary_line([StageOutcome(STATUS, "done", 12.345)], RESULTS, total_s=20.0))
    assert line["acceptance_length"] == {"macro": 3.01, "math": 4.9}
    assert (line["lossless"], line["speedup"], line["seconds"]) == (
        [20, 20],
        1.66,
        {"evaluate": 12.35, "total": 20.0},
    )
    assert line["peak_rss_bytes"] > 1e7 and line["result"] == STATUS.artifact_url
    assert "lossless" not in json.loads(
        summary_line([StageOutcome(STATUS, "done", 1.0)], None, total_s=1.0)
    )


def test_prefect_keys_hold_only_what_prefect_takes():
    assert prefect_key("DSpark_qwen3-4b.v2-Answers") == "dspark-qwen3-4b-v2-answers"
