"""Two results on the same prompts: paired, so that small differences show; unmatched prompts
are counted, not compared.
"""

import json
from pathlib import Path

import pytest

from deepspec.errors import ArtifactMismatch
from deepspec.evaluate.compare import compare, match
from deepspec.report.comparison import compare_results
from tests.cli.test_main import run
from tests.conftest import tiny_run
from tests.evaluate.made_results import BENCHMARKS, folder_of, made_rows, put_result


def line_of(found, name: str, kind: str = "acceptance"):
    return next(line for line in getattr(found, kind) if name in (line.benchmark, line.overall))


def test_a_better_draft_is_told_from_a_worse_one():
    found = compare(made_rows(), made_rows(better=0.05))
    assert (found.matched, found.unmatched) == (72, (0, 0))
    for name in [*BENCHMARKS, "micro", "macro"]:
        line = line_of(found, name)
        low, high = line.interval
        assert line.difference == pytest.approx(line.b - line.a)
        assert 0 < low < line.difference < high
        assert line.above_zero > 0.99


def test_a_result_is_no_better_than_itself():
    found = compare(made_rows(), made_rows())
    for line in [*found.acceptance, *found.speed]:
        assert (line.difference, line.interval, line.above_zero) == (0.0, (0.0, 0.0), 0.0)


def test_pairs_make_the_interval_narrower_than_two_separate_ones():
    """Both sides share what makes a prompt hard; drawn apart, that would hide a difference this
    small.
    """
    rows, better = made_rows(prompts=60), made_rows(prompts=60, better=0.01)
    low, high = line_of(compare(rows, better), "micro").interval
    shuffled = [
        {**row, "prompt_digest": f"{row['benchmark']}-{(row['prompt'] + 7) % 60}"} for row in better
    ]
    apart = line_of(compare(rows, shuffled), "micro").interval
    assert high - low < 0.5 * (apart[1] - apart[0])


def test_prompts_are_matched_by_what_was_rendered_not_by_their_number():
    rows = made_rows(prompts=5)
    there = [{**row, "prompt": row["prompt"] + 100} for row in reversed(rows[3:])]
    pairs = match(rows, there)
    assert all(
        a["prompt_digest"] == b["prompt_digest"] and a["benchmark"] == b["benchmark"]
        for a, b in pairs
    )
    found = compare(rows, [*there, *made_rows(benchmarks={"mine": ("other", 0.5)}, prompts=4)])
    assert (found.matched, found.unmatched) == (12, (3, 4))
    assert not any(line.benchmark == "mine" for line in found.acceptance)


def test_a_prompt_that_is_there_twice_is_matched_twice():
    rows = [
        {**row, "prompt_digest": "same"}
        for row in made_rows(benchmarks={"gsm8k": ("math", 0.9)}, prompts=3)
    ]
    assert [b["prompt"] for _, b in match(rows, rows[:2])] == [0, 1]


def test_speed_is_compared_at_each_batch_size_that_both_have():
    found = compare(made_rows(batch_sizes=[1, 4]), made_rows(batch_sizes=[1, 4, 8], better=0.05))
    assert {line.batch_size for line in found.speed} == {1, 4}
    assert line_of(found, "macro", "speed").above_zero > 0.99
    assert {line.groups for line in found.speed if line.benchmark == "gsm8k"} == {24, 6}


def test_of_a_single_prompt_nothing_is_sure():
    """Nor of several benchmarks of one prompt each, together."""
    found = compare(made_rows(prompts=1), made_rows(prompts=1, better=0.05))
    for line in found.acceptance:
        assert line.interval is None and line.above_zero is None


def test_temperatures_are_not_mixed():
    found = compare(made_rows(temperatures=[0.0, 1.0]), made_rows(temperatures=[1.0]))
    assert {line.temperature for line in found.acceptance} == {1.0}


def test_results_without_a_common_prompt_are_refused():
    with pytest.raises(ArtifactMismatch, match="no prompt in common"):
        compare(made_rows(), [{**row, "prompt_digest": "other"} for row in made_rows()])


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """The folders of two results in stores of their own."""
    # which `rich` would take for markup
    worse = put_result(tiny_run(tmp_path / "[a]"), made_rows())
    better = put_result(
        tiny_run(tmp_path / "b", "draft.num_layers=1", "name=mine"), made_rows(better=0.05)
    )
    return [folder_of(worse), folder_of(better)]


def test_the_command_shows_who_is_compared_on_what_and_what_was_set_otherwise(
    capsys, two: list[str]
):
    code, out, _ = run(capsys, "compare", *two)
    assert code == 0
    for words in (
        two[0],
        two[1],
        "72 prompts are in both; 0 only in A, 0 only in B",
        "macro",
        "95 % interval",
        "100.0%",
        "draft.num_layers",
    ):
        assert words in out
    assert "resources." not in out, "no result depends on how the work was done"


def test_the_command_gives_scripts_one_json_object(capsys, two: list[str]):
    code, out, _ = run(capsys, "compare", *two, "--json")
    found = json.loads(out)
    assert (code, found["a"]["name"], found["b"]["name"], found["settings"]) == (
        0,
        "dspark-demo",
        "mine",
        {"draft.num_layers": ["2", "1"]},
    )
    assert found["acceptance"][0].keys() == {
        *("temperature", "benchmark", "prompts"),
        *("a", "b", "difference", "interval", "above_zero"),
    }
    assert found == compare_results(*two).to_json()


def test_an_artifact_that_is_no_result_is_refused(capsys, two: list[str], store: Path):
    demo = next((store / "demo").iterdir())
    code, _, err = run(capsys, "compare", two[0], str(demo))
    assert code == 2
    assert "stage 'demo', not a result" in err
