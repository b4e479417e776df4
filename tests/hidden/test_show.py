"""`python -m deepspec show`: what is marked is what the target said, its end of turn included."""

import re
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from deepspec.__main__ import app
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.errors import ConfigError
from deepspec.hidden.sequences import CaptureRow, CaptureRows, sequence_id
from deepspec.hidden.show import show_sample
from deepspec.target.chat import load_chat
from tests.conftest import TINY, tiny_run


def test_the_marked_text_is_the_answer_with_its_end_of_turn(captured: Path):
    config = tiny_run(captured)
    artifact, chat = Run(config).artifact("answers"), load_chat(Run(config))
    record = artifact.record(1)
    assert record is not None
    answer = read_table(artifact.fetch_shard(record)).to_pylist()[2]
    headline, text = show_sample(Run(config), shard=1, row=2, colours=False)
    marked = re.findall("⟦(.*?)⟧", text.plain, flags=re.DOTALL)
    assert marked == [chat.tokenizer.decode(turn["token_ids"]) for turn in answer["turns"]]
    assert f"{answer['id']:016x}" in headline.plain
    assert f"{len(answer['turns'][0]['token_ids'])} supervised" in headline.plain


def test_the_verb_prints_the_sample(captured: Path):
    sets = [part for override in TINY for part in ("--set", override)]
    shown = CliRunner().invoke(
        app, ["show", "demo", *sets, "--store", str(captured), "--shard", "1", "--row", "2"]
    )
    assert shown.exit_code == 0, shown.output
    assert "⟦" in shown.output


@pytest.mark.parametrize(
    ("shard", "row", "said"),
    [(99, 0, "shard 99 of the answers is not committed"), (0, 4, "has 4 rows, there is no row 4")],
)
def test_a_shard_or_row_that_is_not_there_is_refused(
    captured: Path, shard: int, row: int, said: str
):
    with pytest.raises(ConfigError, match=said):
        list(show_sample(Run(tiny_run(captured)), shard=shard, row=row, colours=False))


def test_sequences_come_in_the_order_of_their_turns(
    captured: Path, monkeypatch: pytest.MonkeyPatch
):
    """Capture wants them by length; here the first turn's is the longest."""
    lengths = (30, 20, 10)
    made = [
        CaptureRow(sequence_id(7, number), False, [5] * n, [False] + [True] * (n - 1))
        for number, n in enumerate(lengths)
    ]
    answer = pa.Table.from_pylist([{"id": 7, "domain": "chat", "turns": [{"text": "x"}] * 3}])
    monkeypatch.setattr("deepspec.hidden.show.capture_rows", lambda *_: CaptureRows(made[::-1], []))
    monkeypatch.setattr("deepspec.hidden.show.read_table", lambda _: answer)
    headlines = [
        text.plain for text in show_sample(Run(tiny_run(captured)), shard=0, row=0, colours=True)
    ][::2]
    assert [re.findall(r"sequence (\d): (\d+) tokens", line)[0] for line in headlines] == [
        ("0", "30"),
        ("1", "20"),
        ("2", "10"),
    ]
