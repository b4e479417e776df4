"""Columns of a source."""

import json
from pathlib import Path

import pytest

from deepspec.artifacts.run import Run
from deepspec.errors import DataError
from deepspec.prompts.stage import run_prompts
from tests.conftest import tiny_run, write_jsonl
from tests.prompts.runs import all_rows


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
