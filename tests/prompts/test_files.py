"""Files of prompts: their rows, and errors that name the line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepspec.errors import DataError
from tests.conftest import write_jsonl
from tests.prompts.runs import all_rows, conversation, run_files


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
