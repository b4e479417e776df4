"""Benchmark prompts among training prompts (trap A7)."""

import json
from pathlib import Path

import pytest

from tests.conftest import SHARED, write_jsonl
from tests.prompts.runs import conversation, run_files


def test_benchmark_prompts_are_dropped_and_counted_and_are_no_fault_of_the_source(
    store: Path, tmp_path: Path
):
    """Trap A7: case, punctuation and spacing do not hide a benchmark's prompt."""
    benchmark = write_jsonl(
        tmp_path / "b.jsonl", [{"turns": ["How many ducks, Janet?", "And eggs?"]}]
    )
    rows = [
        conversation(1),
        {"prompt": "  how many DUCKS -- janet"},
        {"messages": [{"role": "user", "content": "And  eggs!"}]},
        conversation(1),
    ]
    artifact = run_files(
        store,
        write_jsonl(tmp_path / "p.jsonl", rows),
        decontaminate=json.dumps([str(benchmark)]),
        max_rejected=0,
    )
    (record,) = artifact.records().values()
    assert (record.rows, record.rejected, record.counts) == (1, 3, {"benchmark": 2, "duplicate": 1})
    rejects = [
        json.loads(line)
        for line in artifact.store.read(artifact.path("rejects/00000.jsonl")).decode().splitlines()
    ]
    assert [reject["reason"] for reject in rejects] == ["benchmark", "benchmark", "duplicate"]
    assert str(benchmark) in rejects[0]["detail"]


def test_a_benchmark_turn_without_a_word_matches_nothing(store: Path, tmp_path: Path):
    benchmark = write_jsonl(tmp_path / "b.jsonl", [{"turns": ["?!"]}])
    artifact = run_files(
        store,
        write_jsonl(tmp_path / "p.jsonl", [{"prompt": "..."}]),
        decontaminate=json.dumps([str(benchmark)]),
    )
    assert artifact.records()[0].rows == 1


def test_real_benchmarks_find_their_own_prompts(store: Path, tmp_path: Path):
    files = sorted((SHARED / "eval_datasets").glob("*.jsonl"))
    if not files:
        pytest.skip("no benchmark files beside the repository")
    first = [json.loads(path.read_text().splitlines()[0])["turns"][0] for path in files]
    rows = [{"prompt": text.upper()} for text in first] + [conversation(1)]
    source, names = (
        write_jsonl(tmp_path / "p.jsonl", rows),
        json.dumps([str(path) for path in files]),
    )
    record = run_files(store, source, shard_rows=100, decontaminate=names).records()[0]
    assert (record.rows, record.counts["benchmark"]) == (1, len(files))
