"""The artifact of a failed run: every shard with its reason, and commands that a shell takes as
they are.
"""

import json
import shlex

import pytest
from prefect import flow
from prefect.runtime import flow_run

from deepspec.errors import ChildFailed, ShardsFailed
from deepspec.process.shard_ranges import parse_shards
from flows.failures import MOST_ROWS, deployment_command, failure_text
from flows.parameters import run_name


def test_each_shard_is_a_row_with_its_reason_and_whether_another_try_helps():
    failures = {
        17: {"what": "bad | row\nof <b>words</b>", "transient": False},
        5: {"what": "busy", "transient": True},
    }
    text = failure_text(
        "run",
        ShardsFailed("2 failed", where="/store/x", failures=failures),
        {"Again": "python -m x"},
    )
    assert "| 5 | busy | yes |\n| 17 | bad \\| row of \\<b>words\\</b> | no, not as it is |" in text
    assert "### Again\n\n```\npython -m x\n```" in text


def test_a_child_that_ended_without_a_word_is_shown_with_the_shards_that_it_had():
    error = ChildFailed("answers ended with exit code 1", fix="see its last lines")
    error.failures = {3: {"what": "answers ended with exit code 1", "transient": False}}
    text = failure_text("run", error, {})
    assert "| 3 | answers ended with exit code 1 |" in text and "fix: see its last lines" in text


def test_of_thousands_of_shards_some_are_shown_and_the_others_counted():
    failures = {number: {"what": "bad", "transient": False} for number in range(1000)}
    text = failure_text("run", ShardsFailed("1000 failed", failures=failures), {})
    assert text.count("| bad |") == MOST_ROWS and "and 800 more shards." in text


def test_a_deployments_command_says_the_parameters_again():
    overrides = ['answers.system_prompt="it\'s"', "train.lr=3e-4"]
    command = deployment_command(
        "regenerate/demo",
        {"recipe": "my run.yaml", "overrides": overrides, "shards": "5,7", "store": ""},
    )
    words = shlex.split(command)
    assert words[:4] == ["prefect", "deployment", "run", "regenerate/demo"]
    shown = dict(word.split("=", 1) for word in words[5::2])
    assert set(words[4::2]) == {"-p"} and set(shown) == {"recipe", "overrides", "shards"}
    assert (shown["recipe"], json.loads(shown["overrides"]), shown["shards"]) == (
        "my run.yaml",
        overrides,
        "5,7",
    )


@flow(name="capture", flow_run_name=run_name)
def capture(recipe: str, shards: str | int = "") -> str:
    return str(flow_run.name)


@flow(name="train", flow_run_name=run_name)
def train(recipe: str) -> str:
    return str(flow_run.name)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"recipe": "qwen3-4b", "shards": "17-42"}, "capture qwen3-4b 0017-0042"),
        (
            {"recipe": "dflash-qwen3-4b", "shards": "40-52,17,18"},
            "capture qwen3-4b 0017-0018,0040-0052",
        ),
        ({"recipe": "runs/mine.yaml", "shards": 5}, "capture mine.yaml 0005"),
        ({"recipe": "demo"}, "capture demo"),
        ({"recipe": "demo", "shards": "5-3"}, "capture demo 5-3"),
    ],
)
def test_a_runs_name_shows_what_it_does(parameters: dict[str, str | int], name: str):
    assert capture(**parameters) == name


def test_what_depends_on_the_draft_is_named_by_it():
    assert train(recipe="dflash-qwen3-4b") == "train dflash-qwen3-4b"


def test_shards_in_names_are_those_that_shards_takes_and_too_many_are_cut():
    name = capture(recipe="demo", shards=",".join(map(str, range(0, 100, 2))))
    assert name.endswith(",...") and len(name) < 90
    assert parse_shards(name.split()[-1].removesuffix(",...")) == list(range(0, 24, 2))
    assert parse_shards("0017,0040-0052") == parse_shards("17,40-52")
