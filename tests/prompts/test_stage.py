"""The prompts stage: stable ids, rejects with reasons, the same shards whenever it is run."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepspec.artifacts.digests import file_digest
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.config.data import PromptsConfig
from deepspec.errors import DataError
from deepspec.prompts.rows import Prompt, Rejected, make_prompt
from deepspec.prompts.stage import run_prompts
from tests.conftest import SHARED, tiny_run, write_jsonl

SETTINGS = PromptsConfig.model_validate({"source": {"kind": "demo"}, "held_out": 0.5})


def conversation(number: int) -> dict:
    return {
        "conversations": [
            {"from": "human", "value": f"question {number}"},
            {"from": "gpt", "value": f"answer {number}"},
        ]
    }


def run_files(store: Path, *paths: Path, shard_rows: int = 4, **settings: object):
    source = json.dumps({"kind": "files", "paths": [str(path) for path in paths]})
    overrides = [
        f"prompts.source={source}",
        f"prompts.shard_rows={shard_rows}",
        "prompts.limit=null",
    ]
    return run_prompts(
        Run(
            tiny_run(
                store, *overrides, *(f"prompts.{key}={value}" for key, value in settings.items())
            )
        )
    )


def all_rows(artifact) -> list[dict]:
    return [
        row
        for record in artifact.records().values()
        for row in read_table(artifact.fetch_shard(record)).to_pylist()
    ]


def test_assistant_turns_are_dropped_and_the_rest_is_kept():
    row = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
        ]
    }
    prompt = make_prompt(row, SETTINGS)
    assert isinstance(prompt, Prompt)
    assert json.loads(prompt.messages) == [
        {"content": "s", "role": "system"},
        {"content": "u", "role": "user"},
    ]


def test_the_same_conversation_has_the_same_id_in_every_shape():
    shapes = [
        {"prompt": "hello"},
        {"turns": ["hello"]},
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "hi"},
            ]
        },
        {"conversations": [{"from": "human", "value": "hello"}]},
    ]
    assert len({make_prompt(row, SETTINGS) for row in shapes}) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no_messages"),
        ({"messages": []}, "no_messages"),
        ({"messages": "hello"}, "no_messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown_role"),
        ({"messages": ["hello"]}, "unknown_role"),
        ({"turns": "abc"}, "no_messages"),
        ({"prompt": "half a pair: \ud83d"}, "bad_text"),
        ({"prompt": "x", "tools": [{"name": "\ud83d"}]}, "bad_tools"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty_message"),
        ({"messages": [{"role": "user", "content": None}]}, "empty_message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "roles_out_of_order"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]},
            "roles_out_of_order",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "system_not_first",
        ),
    ],
)
def test_each_kind_of_bad_row_is_rejected_with_its_reason(row: dict, reason: str):
    outcome = make_prompt(row, SETTINGS)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == reason


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


def test_parquet_and_jsonl_give_the_same_prompts(store: Path, tmp_path: Path):
    rows = [conversation(n) for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    made = [
        run_files(store, path)
        for path in (write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "p.parquet")
    ]
    assert all_rows(made[0]) == all_rows(made[1])


def test_a_local_data_set_is_read_through_datasets(store: Path, tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [conversation(n) for n in range(3)])
    source = json.dumps({"kind": "dataset", "name": str(folder)})
    artifact = run_prompts(Run(tiny_run(store, f"prompts.source={source}")))
    assert len(all_rows(artifact)) == 3


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ["empty"]),
        ('{"prompt": "x"}\n{"prompt": \n', ["line 2", "not JSON"]),
        ('{"prompt": "x"}\n[1]\n', ["line 2", "not an object"]),
        ('{"messages": []}\n', ["no usable prompt"]),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(
    store: Path, tmp_path: Path, text: str, said: list[str]
):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError) as caught:
        run_files(store, tmp_path / "p.jsonl")
    assert all(words in str(caught.value) for words in said)


def test_a_missing_file_is_refused_by_name(store: Path, tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        run_files(store, tmp_path / "none.jsonl")


def test_too_many_rejected_rows_stop_the_stage(store: Path, tmp_path: Path):
    rows = [conversation(0), {"messages": []}]
    with pytest.raises(DataError, match="max_rejected"):
        run_files(store, write_jsonl(tmp_path / "p.jsonl", rows))


def test_calls_of_tools_and_their_results_are_kept_and_other_answers_are_not():
    call = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "thanks"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    made = [
        make_prompt({"messages": messages, "tools": given}, SETTINGS)
        for given in (tools, json.dumps(tools))
    ]
    assert made[0] == made[1]
    assert isinstance(made[0], Prompt)
    assert json.loads(made[0].tools or "") == tools
    assert [message["role"] for message in json.loads(made[0].messages)] == [
        "user",
        "assistant",
        "tool",
        "user",
    ]
    bare = make_prompt({"messages": messages}, SETTINGS)
    assert isinstance(bare, Prompt)
    assert bare.id != made[0].id


@pytest.mark.parametrize("tools", ["{", "3", [1], {"a": 1}])
def test_tools_that_are_none_are_rejected(tools: object):
    outcome = make_prompt({"prompt": "x", "tools": tools}, SETTINGS)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "bad_tools"


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


def test_a_column_of_any_name_can_be_read(store: Path, tmp_path: Path):
    rows = [
        {"q": "a question", "messages": "of something else"},
        {"q": [{"role": "user", "content": "another"}]},
    ]
    source = json.dumps(
        {"kind": "files", "paths": [str(write_jsonl(tmp_path / "p.jsonl", rows))], "column": "q"}
    )
    artifact = run_prompts(Run(tiny_run(store, f"prompts.source={source}", "prompts.limit=null")))
    assert [json.loads(row["messages"])[0]["content"] for row in all_rows(artifact)] == [
        "a question",
        "another",
    ]


@pytest.mark.parametrize(
    ("column", "said"),
    [({}, "no column messages or"), ({"column": "q"}, "no column q, only other, text")],
)
def test_a_source_without_the_column_is_refused_at_its_first_row(
    store: Path, tmp_path: Path, column: dict, said: str
):
    path = write_jsonl(tmp_path / "p.jsonl", [{"text": "x", "other": 1}] * 3)
    source = json.dumps({"kind": "files", "paths": [str(path)], **column})
    with pytest.raises(DataError, match=said):
        run_prompts(Run(tiny_run(store, f"prompts.source={source}")))


@pytest.mark.parametrize(
    "settings",
    [{"name": "nobody/no-such-set"}, {"split": "no-such-split"}, {"subset": "no-such-subset"}],
)
def test_a_data_set_split_or_subset_that_does_not_exist_is_refused_by_name(
    store: Path, tmp_path: Path, settings: dict
):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [conversation(1)])
    source = json.dumps({"kind": "dataset", "name": str(folder), **settings})
    with pytest.raises(DataError) as caught:
        run_prompts(Run(tiny_run(store, f"prompts.source={source}")))
    assert next(iter(settings.values())) in str(caught.value)


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


def test_a_data_set_that_is_not_pinned_stays_with_the_commit_that_it_began_with(
    store: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    """The hub cannot be reached by a test: what it would say stands in for it."""
    commits, read = iter(["aaa", "bbb"]), []

    def load_dataset(
        name: str, subset: str | None, *, split: str, revision: str, streaming: bool
    ) -> list[dict]:
        read.append(revision)
        return [conversation(n) for n in range(5)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("deepspec.prompts.sources.newest_revision", lambda source: next(commits))
    source = json.dumps({"kind": "dataset", "name": "somebody/a-set"})
    artifact = run_prompts(Run(tiny_run(store, f"prompts.source={source}")))
    artifact.store.remove(artifact.path("records/00001.json"))
    run_prompts(Run(tiny_run(store, f"prompts.source={source}")))
    assert read == ["aaa", "aaa"]
    assert "prompts.source.revision=aaa" in caplog.text
    pinned = json.dumps({"kind": "dataset", "name": "somebody/a-set", "revision": "v1"})
    run_prompts(Run(tiny_run(store, f"prompts.source={pinned}")))
    assert read[2:] == ["v1"]


@pytest.mark.parametrize(
    "also", [{"prompt": "one"}, {"prompt": "one", "turns": []}, {"conversations": None}]
)
def test_a_row_with_several_columns_keeps_its_whole_conversation(also: dict):
    said = [("user", "one"), ("assistant", "1"), ("user", "two")]
    prompt = make_prompt(
        {"messages": [{"role": role, "content": text} for role, text in said], **also}, SETTINGS
    )
    assert isinstance(prompt, Prompt)
    assert [message["content"] for message in json.loads(prompt.messages)] == ["one", "two"]
