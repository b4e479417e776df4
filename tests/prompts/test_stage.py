"""The prompts stage: stable ids, rejects with reasons, the same shards whenever it is run."""

import json
from pathlib import Path

import pytest

from deepspec.artifacts.digests import file_digest
from deepspec.artifacts.run import Run
from deepspec.errors import DataError
from tests.conftest import SHARED, tiny_run, write_jsonl
from tests.prompts.runs import all_rows, conversation, run_files


def test_the_held_out_split_belongs_to_the_row_and_not_to_its_place(store: Path, tmp_path: Path):
    first = write_jsonl(tmp_path / "a.jsonl", [conversation(n) for n in range(20)])
    more = write_jsonl(
        tmp_path / "b.jsonl",
        [conversation(n) for n in range(30, 20, -1)] + [conversation(n) for n in range(20)],
    )
    split = [
        {row["id"]: row["held_out"] for row in all_rows(run_files(store, path, held_out=0.5))}
        for path in (first, more)
    ]
    assert 0 < sum(split[0].values()) < 20
    assert all(split[1][row] == held_out for row, held_out in split[0].items())


def test_rows_are_cut_into_shards_in_order_and_rejects_are_kept_beside_them(
    store: Path, tmp_path: Path
):
    rows = [
        *(conversation(n) for n in range(6)),
        {"messages": []},
        conversation(2),
        conversation(7),
    ]
    artifact = run_files(store, write_jsonl(tmp_path / "p.jsonl", rows), max_rejected=0.5)
    records = artifact.records()
    assert [record.rows for record in records.values()] == [4, 3]
    assert records[1].rejected == 2
    rejects = artifact.store.read(artifact.path("rejects/00001.jsonl")).decode().splitlines()
    assert [(json.loads(line)["row"], json.loads(line)["reason"]) for line in rejects] == [
        (6, "no_messages"),
        (7, "duplicate"),
    ]
    manifest = artifact.manifest()
    assert manifest is not None
    assert manifest.totals["rows"] == 7


def test_a_second_run_adds_nothing_and_a_lost_record_brings_back_the_same_shard(
    store: Path, tmp_path: Path
):
    path = write_jsonl(tmp_path / "p.jsonl", [conversation(n) for n in range(10)])
    artifact = run_files(store, path)
    before = artifact.manifest()
    artifact.store.remove(artifact.path("records/00001.json"))
    after = run_files(store, path).manifest()
    assert before is not None
    assert after is not None
    assert after.digest == before.digest


def test_too_many_rejected_rows_stop_the_stage(store: Path, tmp_path: Path):
    rows = [conversation(0), {"messages": []}]
    with pytest.raises(DataError, match="max_rejected"):
        run_files(store, write_jsonl(tmp_path / "p.jsonl", rows))


def test_files_of_one_name_in_two_folders_each_decide_the_fingerprint(tmp_path: Path):
    """They were told apart by their names alone, so a changed source could be taken for the old
    one.
    """
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    source = write_jsonl(tmp_path / "a" / "x.jsonl", [conversation(1)])
    benchmark = write_jsonl(tmp_path / "b" / "x.jsonl", [{"turns": ["q"]}])
    files = json.dumps({"kind": "files", "paths": [str(source)]})
    overrides = [f"prompts.source={files}", f"prompts.decontaminate={json.dumps([str(benchmark)])}"]
    found = []
    for number in (1, 2):
        write_jsonl(source, [conversation(number)])
        file_digest.cache_clear()
        found.append(Run(tiny_run(tmp_path, *overrides)).artifact("prompts").key.fingerprint)
    assert found[0] != found[1]


def test_duplicates_may_be_kept_each_with_an_id_of_its_own_and_the_split_of_the_first(
    store: Path, tmp_path: Path
):
    rows = [conversation(n % 3) for n in range(9)]
    made = [
        all_rows(
            run_files(
                store,
                write_jsonl(tmp_path / f"{len(more)}.jsonl", [*more, *rows]),
                duplicates="keep",
                held_out=0.5,
            )
        )
        for more in ([], [conversation(7)])
    ]
    assert len({row["id"] for row in made[0]}) == 9
    assert {row["id"] for row in made[0]} < {row["id"] for row in made[1]}
    for text in {row["messages"] for row in made[0]}:
        assert len({row["held_out"] for row in made[0] if row["messages"] == text}) == 1


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
