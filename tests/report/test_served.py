"""A served result in the report: beside the one in process of the same draft, and red where the
draft is served otherwise than it was trained.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.config.run import RunConfig
from deepspec.evaluate.results import read_rows
from deepspec.evaluate.served_compare import served_lines
from deepspec.report.report import report_text
from tests.conftest import tiny_run
from tests.evaluate.made_results import made_rows, put_result

SERVED_BY = {
    "engine": "vllm",
    "version": "0.32.0",
    "num_speculative_tokens": 7,
    "draft_sampling": "greedy",
}
BFLOAT16 = "evaluate.dtype=bfloat16"


def served(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as servers give them: at more than one request in flight the rounds of a group
    stand in its first row.
    """
    found, first = [], {}
    for row in rows:
        extra = {"request_seconds": row["seconds"], "plain_request_seconds": row["plain_seconds"]}
        row = {**row, **extra, "draft_seconds": 0.0, "verify_seconds": 0.0}
        head = first.setdefault((row["batch_size"], row["benchmark"], row["group"]), row)
        for name in ("proposed", "accepted", "committed") if row["batch_size"] > 1 else ():
            row[name] = list(row[name])
            if head is not row:
                head[name] += row[name]
                row[name] = []
        found.append(row)
    return found


def put_served(config: RunConfig, rows: list[dict[str, Any]], **changes: object) -> Artifact:
    run = Run(config)
    artifact = run.artifact("evaluate")
    artifact.create(config.model_dump(mode="json"))
    artifact.write("engine.json", json.dumps({**SERVED_BY, **changes}).encode())
    put_result(config, rows)
    train = run.artifact("train")
    lines = [{"step": 1, "held_out_acceptance_length": 3.25}, {"step": 2, "loss": 1.0}]
    train.write("metrics.jsonl", "\n".join(map(json.dumps, lines)).encode())
    return artifact


def settings(*more: str) -> list[str]:
    return ["evaluate.temperatures=[0.0]", *more]


def test_a_draft_that_is_served_as_it_was_trained_is_beside_its_result_in_process(tmp_path: Path):
    rows = made_rows(prompts=6, batch_sizes=[1, 4])
    put_result(tiny_run(tmp_path, *settings()), rows)
    config = tiny_run(tmp_path, *settings("evaluate.engine=vllm", "evaluate.concurrencies=[1, 4]"))
    artifact = put_served(config, served(rows))
    text = report_text([artifact], "markdown")
    assert "Served by vLLM 0.32.0, 7 tokens proposed per round, draft sampling greedy" in text
    line = next(line for line in text.splitlines() if line.startswith("| all rounds"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:4] == ["18", "3.25"] and cells[4] == cells[5]
    assert cells[7] == cells[8] and cells[9:] == ["18/18", "agree"]
    assert "Likely causes" not in text and 'class="finding"' not in report_text([artifact], "html")
    assert "speculative decoding, served" in report_text([artifact], "html")
    assert sum("speed-up in process" in line for line in text.splitlines()) == 1


@pytest.mark.parametrize("size", [1, 4])
def test_rounds_of_groups_are_those_of_their_prompts(size: int):
    rows = made_rows(prompts=8, batch_sizes=[size])
    lines = served_lines(rows, served(rows), ("float32", "float32"))
    assert [line.benchmark for line in lines] == ["gsm8k", "humaneval", "alpaca", None]
    for line in lines:
        assert line.rounds[0] == line.rounds[1] > 0 and not line.is_finding
        assert line.acceptance_length[0] == line.acceptance_length[1]
    # A group of which one prompt is in one result alone is not compared.
    some = served_lines(rows[1:], served(rows), ("float32", "float32"))
    assert some[0].prompts == 8 - size


def test_one_round_more_is_a_finding_in_float32_and_rounding_in_bfloat16():
    rows = made_rows(prompts=8)
    more = served(rows)
    more[0] = {**more[0], "proposed": [*more[0]["proposed"], 7]}
    for name in ("accepted", "committed"):
        more[0][name] = [*more[0][name], 1]
    exact = served_lines(rows, more, ("float32", "float32"))
    assert [line.is_finding for line in exact] == [True, False, False, True]
    assert not any(line.is_finding for line in served_lines(rows, more, ("bfloat16", "bfloat16")))


def test_a_draft_that_is_served_otherwise_is_red_with_the_likely_causes(tmp_path: Path):
    rows = made_rows(prompts=6)
    put_result(tiny_run(tmp_path, *settings()), rows)
    config = tiny_run(tmp_path, *settings("evaluate.engine=vllm", BFLOAT16))
    wrong = []
    for row in served(rows):
        rounds = row["num_tokens"] - 1
        counts = {"proposed": [5] * rounds, "accepted": [0] * rounds, "committed": [1] * rounds}
        wrong.append({**row, **counts, "token_ids": [6, *row["token_ids"][1:]]})
    artifact = put_served(config, wrong, num_speculative_tokens=5)
    page = report_text([artifact], "html")
    assert '<div class="finding" role="alert">' in page
    text = report_text([artifact], "markdown")
    for cause in (
        "> **The served draft does not draft as it does in process: 1.00 tokens per round",
        "The server proposes 5 tokens per round, in process it is 7",
        "Next to nothing is accepted: another block layout",
        "The number formats differ: float32 and bfloat16",
        "18 of 18 answers differ from those in process",
    ):
        assert cause.replace("_", "\\_") in text
    assert "DIFFER" in text


def test_without_a_result_in_process_the_section_names_how_to_get_one(tmp_path: Path):
    rows = made_rows(prompts=4)
    # of another limit: its rounds are others
    put_result(tiny_run(tmp_path, *settings("evaluate.max_new_tokens=99")), rows)
    config = tiny_run(tmp_path, *settings("evaluate.engine=vllm", "evaluate.concurrencies=[1]"))
    artifact = put_served(config, served(rows))
    assert "run the same evaluation with evaluate.engine=in" in report_text([artifact], "html")
    assert len(read_rows(artifact)) == 12
