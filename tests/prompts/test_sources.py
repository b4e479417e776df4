"""Columns of a source."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepspec.artifacts.run import Run
from deepspec.errors import DataError
from deepspec.prompts.stage import run_prompts
from tests.conftest import tiny_run, write_jsonl
from tests.prompts.runs import all_rows, conversation, run_files


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


def test_a_local_data_set_is_read_through_datasets(store: Path, tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [conversation(n) for n in range(3)])
    source = json.dumps({"kind": "dataset", "name": str(folder)})
    artifact = run_prompts(Run(tiny_run(store, f"prompts.source={source}")))
    assert len(all_rows(artifact)) == 3


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


def test_parquet_and_jsonl_give_the_same_prompts(store: Path, tmp_path: Path):
    rows = [conversation(n) for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    made = [
        run_files(store, path)
        for path in (write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "p.parquet")
    ]
    assert all_rows(made[0]) == all_rows(made[1])


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
