"""Sample lengths from the source, the prompts or the answers, whichever is the furthest: they
tell the same story.
"""

from pathlib import Path

import pytest

from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.config.run import RunConfig
from deepspec.errors import DataError
from deepspec.hidden.stage import run_capture
from deepspec.plan.assumed_answers import ASSUMED_ANSWER_TOKENS, assistant_texts
from deepspec.plan.parts import Number, Workload
from deepspec.plan.workload import count_source_rows, relative_error, sample_workload
from deepspec.prompts.stage import run_prompts
from tests.conftest import tiny_run, write_jsonl


def workload(config: RunConfig, num_rows: int = 256) -> Workload:
    return sample_workload(Run(config), num_rows=num_rows)


def of_file(store: Path, path: Path, *overrides: str) -> RunConfig:
    source = f"prompts.source={{kind: files, paths: [{path}]}}"
    return tiny_run(store, source, "prompts.limit=null", "answers.max_new_tokens=64", *overrides)


def chat_row(number: int, answer: str) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": answer},
        ]
    }


def test_source_prompts_and_answers_agree_and_answers_are_what_capture_counts(store: Path):
    """The tiny target runs into its limit of 12 tokens, which is what answers are assumed to
    be: all totals are equal.
    """
    config = tiny_run(store)
    before = workload(config)
    run_prompts(Run(config))
    with_prompts = workload(config)
    run_answers(Run(config))
    with_answers = workload(config)
    run_capture(Run(config))
    captured = Run(config).artifact("hidden").records().values()
    assert with_answers.counts.tokens == sum(record.tokens for record in captured)
    assert with_answers.counts.samples == sum(record.rows for record in captured)
    assert with_answers.counts.supervised == sum(record.counts["supervised"] for record in captured)
    assert (with_answers.origin, with_answers.error) == ("exact", 0.0)
    assert before.counts.tokens == pytest.approx(with_answers.counts.tokens, rel=0.03)
    assert with_prompts.counts.tokens == pytest.approx(with_answers.counts.tokens, rel=0.03)
    assert [found.prompts for found in (before, with_prompts, with_answers) if found.prompts] == [
        24,
        24,
        24,
    ]


def test_a_sample_of_the_answers_is_scaled_and_says_how_sure_it_is(captured: Path):
    config = tiny_run(captured)
    whole, part = workload(config), workload(config, num_rows=12)
    assert part.counts.tokens == pytest.approx(whole.counts.tokens, rel=0.1)
    # the records know it
    assert part.counts.supervised == pytest.approx(whole.counts.supervised, rel=0.01)
    assert part.origin == "sample of 12 answers"
    assert 0 < part.error < 0.2


def test_half_of_the_answers_stand_for_all_prompts(store: Path):
    config = tiny_run(store)
    run_prompts(Run(config))
    run_answers(Run(config), shards=[0, 2, 4])
    part = workload(config)
    assert (part.origin, part.answers_from) == ("sample of 12 answers", "3 of 6 shards committed")
    assert part.counts.samples == 24


def test_answers_are_as_long_as_those_in_the_source(store: Path, tmp_path: Path):
    short = of_file(
        store, write_jsonl(tmp_path / "short.jsonl", [chat_row(n, "yes") for n in range(20)])
    )
    long = of_file(
        store, write_jsonl(tmp_path / "long.jsonl", [chat_row(n, "yes " * 400) for n in range(20)])
    )
    assert workload(short).answers_from == workload(long).answers_from == "as long as in the source"
    assert {size.supervised for size in workload(long).sizes} == {64}  # answers.max_new_tokens
    assert max(size.supervised for size in workload(short).sizes) < 10
    before = workload(short).counts
    run_prompts(Run(short))
    assert workload(short).counts == before


def test_without_any_answer_a_length_is_assumed_and_said(store: Path, tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"question {n}"} for n in range(5)])
    found = workload(of_file(store, path, "answers.max_new_tokens=4096", "hidden.max_length=2048"))
    assert found.answers_from == f"assumed {ASSUMED_ANSWER_TOKENS} tokens each"
    assert found.sizes[0].supervised == pytest.approx(ASSUMED_ANSWER_TOKENS, rel=0.02)


def test_what_max_length_cuts_is_counted(store: Path, tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [chat_row(n, "yes " * 400) for n in range(5)])
    found = workload(of_file(store, path, "hidden.max_length=32"))
    assert all(size.tokens == 32 < size.uncut_tokens for size in found.sizes)


def test_rows_that_cannot_be_used_are_not_counted(store: Path, tmp_path: Path):
    rows = [chat_row(n, "yes") if n % 4 else {"messages": []} for n in range(40)]
    found = workload(of_file(store, write_jsonl(tmp_path / "rows.jsonl", rows)), num_rows=9)
    assert found.prompts is not None
    assert found.prompts == pytest.approx(30, abs=1)
    assert "usable" in found.prompts.origin


def test_a_source_without_a_usable_row_is_refused(store: Path, tmp_path: Path):
    config = of_file(store, write_jsonl(tmp_path / "rows.jsonl", [{"messages": []}] * 3))
    with pytest.raises(DataError, match="none of the source's first 3 rows is usable"):
        workload(config)


def test_rows_of_files_are_counted_without_parsing_them(store: Path, tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", [chat_row(n, "yes") for n in range(7)])
    path.write_text(path.read_text() + "\n")
    assert count_source_rows(Run(of_file(store, path))) == 7
    assert count_source_rows(Run(tiny_run(store))) == 240


def test_a_data_set_that_does_not_say_its_length_is_planned_per_thousand(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [chat_row(n, "yes") for n in range(30)])
    source = f"prompts.source={{kind: dataset, name: {folder}}}"
    config = tiny_run(store, source, "prompts.limit=null")
    told = workload(config, num_rows=10)
    assert isinstance(told.prompts, Number)
    assert (told.prompts, told.prompts.origin) == (30, "rows of the source")
    assert told.counts.samples == 30
    monkeypatch.setattr("deepspec.plan.workload._dataset_rows", lambda source: None)
    unknown = workload(config, num_rows=10)
    assert (unknown.prompts, unknown.counts.samples) == (None, 1000)
    whole = workload(config).prompts
    assert whole is not None
    assert (whole, whole.origin) == (30, "source, all usable")
    limited = workload(tiny_run(store, source, "prompts.limit=20"), num_rows=10)
    assert limited.prompts is not None
    assert (limited.prompts, limited.counts.samples) == (20, 20)


def test_every_shape_of_source_row_gives_its_answers():
    assert assistant_texts(
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    ) == ("b",)
    assert assistant_texts({"prompt": "a"}) == assistant_texts({"turns": ["a"]}) == ()


def test_the_error_of_a_sample_shrinks_with_its_root():
    assert relative_error([5.0] * 10) == 0
    assert relative_error([5.0]) == 0
    assert relative_error([1.0, 3.0]) == pytest.approx(1.96 * (2**0.5 / 2**0.5) / 2)
    assert relative_error([1.0, 3.0] * 100) == pytest.approx(
        relative_error([1.0, 3.0]) / 10, rel=0.35
    )
