"""The report: everything that a result holds, in one file that asks nobody for anything; names
of users break nothing.
"""

import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Counts
from deepspec.artifacts.tables import write_table
from deepspec.artifacts.verify import verify_artifact
from deepspec.errors import ArtifactMismatch, DataError
from deepspec.report.report import open_results, put_report, report_text
from tests.cli.test_main import run
from tests.conftest import tiny_run, write_jsonl
from tests.evaluate.made_results import (
    folder_of,
    made_calibration,
    made_rows,
    made_scheduler,
    put_result,
)

VOID = {"meta", "link", "br", "path", "rect", "circle"}
NASTY = 'x<script>alert("1")<script>|`*_"\'&'


class Outline(HTMLParser):
    """Tags, texts and attributes; fails on a page whose tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def whole(tmp_path: Path) -> Artifact:
    """A result with everything: batch sizes, temperatures, calibration, scheduler."""
    rows = made_rows(batch_sizes=[1, 4], temperatures=[0.0, 1.0], prompts=8)
    return put_result(
        tiny_run(tmp_path / "whole"),
        rows,
        more={"calibration": made_calibration(), "scheduler": made_scheduler()},
    )


@pytest.fixture
def plain(tmp_path: Path) -> Artifact:
    """A result of an older version: one batch size, neither confidence nor scheduler."""
    old = ("batch_size", "group", "domain", "turn", "regret", "confidence")
    return put_result(
        tiny_run(tmp_path / "plain", "draft.num_layers=1"), made_rows(prompts=8), without=old
    )


def test_a_whole_result_shows_every_section_and_every_number_twice(whole: Artifact):
    """Each figure has a title, words for who cannot see it, and its numbers in a table."""
    page = Outline(report_text([whole], "html"))
    titles = [attributes["id"] for attributes in page.named("h2")]
    assert titles == [
        "temperature-0",
        "temperature-1",
        "confidence",
        "thresholds",
        "scheduler",
        "lineage",
        "settings",
    ]
    figures = [attributes for attributes in page.named("svg") if attributes.get("role") == "img"]
    assert (
        len(figures)
        == len(page.named("figure"))
        == len(page.named("desc"))
        == 2 * (2 + 4 + 4 + 1) + 14 + 3 + 1
    )
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for figure in figures:
        assert {figure["aria-labelledby"], figure["aria-describedby"]} <= ids
    assert len(page.named("caption")) == len(page.named("table")) == 2 * 4 + 2 + 1 + 1 + 1
    assert all(attributes["scope"] in ("col", "row") for attributes in page.named("th"))


def test_a_result_of_an_older_version_is_shown_with_what_it_has(plain: Artifact):
    text = report_text([plain], "html")
    assert [attributes["id"] for attributes in Outline(text).named("h2")] == [
        "temperature-0",
        "lineage",
        "settings",
    ]


def test_the_page_needs_nothing_but_itself(whole: Artifact):
    text = report_text([whole], "html")
    assert not re.search(r"<script|https?://|@import|url\(", text)
    assert all(
        attributes.get("href", "").startswith(("#", "data:"))
        for _, attributes in Outline(text).tags
        if "href" in attributes
    )
    assert "default-src 'none'" in text


def test_runs_stand_side_by_side_and_what_was_set_otherwise_stands_out(
    whole: Artifact, plain: Artifact
):
    text = report_text([whole, plain], "html")
    for artifact in (whole, plain):
        assert f"dspark-demo {artifact.key.fingerprint[:6]}" in text
    assert re.search(
        r'<tr class="strong">\s*<th scope="row" class="word">draft.num_layers</th>', text
    )
    assert not re.search(r'<tr class="strong">\s*<th scope="row" class="word">train.lr</th>', text)
    page = Outline(text)
    assert page.named("h2")[0]["id"] == "temperature-0"


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_names_of_users_break_nothing(tmp_path: Path, form):
    rows = made_rows(benchmarks={NASTY: ("other", 0.8), "gsm8k": ("math", 0.9)}, prompts=3)
    path = write_jsonl(tmp_path / f"{NASTY.replace(chr(39), '')}.jsonl", [{"turns": ["x"]}])
    text = report_text(
        [put_result(tiny_run(tmp_path, f"evaluate.benchmarks=[{{name: '{path}'}}]"), rows)], form
    )
    assert "<script" not in text
    if form == "html":
        Outline(text)
    else:
        assert sum("alert" in table for table in markdown_tables(text)) == 4, (
            "acceptance, positions, speed, settings"
        )


def markdown_tables(text: str) -> list[str]:
    """The tables, each row as wide as the others."""
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    return tables


def test_the_same_in_markdown(whole: Artifact):
    text = report_text([whole], "markdown")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings == [
        "Temperature 0",
        "Temperature 1",
        "Confidence",
        "Thresholds",
        "Scheduler",
        "Lineage",
        "Settings",
    ]
    assert len(markdown_tables(text)) == 13
    assert "fitted on 36 prompts (450 rounds) and are scored on 36 others" in text
    assert "| macro (mean of benchmarks) |" in text and whole.key.fingerprint in text


def test_equal_results_give_equal_reports(whole: Artifact):
    assert report_text([whole], "html") == report_text([whole], "html")


def test_a_report_lies_beside_its_result_and_is_no_part_of_its_seal(
    capsys, whole: Artifact, plain: Artifact
):
    before = whole.manifest()
    code, out, _ = run(capsys, "report", folder_of(whole))
    assert (code, out) == (0, f"{whole.url}/report.html\n")
    assert put_report([whole, plain]) == [f"{whole.url}/report-{plain.key.fingerprint}.html"]
    assert whole.manifest() == before
    assert list(verify_artifact(whole, None, num_threads=1)) == []
    assert Path(out.strip()).read_text() == report_text([whole], "html")


def test_a_report_goes_to_the_terminal_or_where_it_is_sent(capsys, plain: Artifact, tmp_path: Path):
    assert run(capsys, "report", folder_of(plain), "--format", "markdown")[1] == report_text(
        [plain], "markdown"
    )
    code, out, _ = run(capsys, "report", folder_of(plain), "--output", str(tmp_path / "mine.html"))
    assert (code, out) == (0, f"{tmp_path / 'mine.html'}\n")
    assert (tmp_path / "mine.html").read_text().startswith("<!DOCTYPE html>")
    code, _, err = run(
        capsys, "report", folder_of(plain), "--output", str(tmp_path / "nowhere" / "mine.html")
    )
    assert code == 2 and "cannot write" in err


def test_what_is_evaluated_so_far_is_shown_and_said_to_be(whole: Artifact):
    whole.store.remove(whole.path("manifest.json"))
    whole.store.remove(whole.path("summary.json"))
    text = report_text([whole], "html")
    assert "Not finished: dspark-demo" in text
    assert "temperature-1" in text and "Scheduler" not in text


def test_a_run_without_any_result_is_told_what_to_do(capsys, tmp_path: Path, store: Path):
    code, _, err = run(capsys, "report", "demo", "--store", str(store))
    assert code == 2 and "nothing was evaluated yet" in err


def commit(
    artifact: Artifact, shard: int, rows: list[dict], *, like: dict, rejected: int = 0
) -> None:
    with artifact.store.staged() as local:
        write_table(pa.Table.from_pylist(rows, pa.Table.from_pylist([like]).schema), local)
        artifact.commit(shard, local, Counts(rows=len(rows), rejected=rejected), upstream=None)


def test_an_answer_without_a_round_is_shown_beside_a_single_prompt(tmp_path: Path):
    row = made_rows(benchmarks={"gsm8k": ("math", 0.9)}, prompts=1)[0]
    artifact = put_result(tiny_run(tmp_path), [row])
    nothing = {
        "benchmark": "empty",
        "proposed": [],
        "accepted": [],
        "committed": [],
        "num_tokens": 1,
        "plain_tokens": 1,
    }
    commit(artifact, 1, [{**row, **nothing}], like=row)
    Outline(report_text([artifact], "html"))


def test_prompts_that_were_left_out_are_counted(tmp_path: Path):
    row = made_rows(prompts=1)[0]
    artifact = put_result(tiny_run(tmp_path), [row])
    commit(artifact, 1, [], like=row, rejected=3)
    assert "3 prompts of dspark-demo were not decoded" in report_text([artifact], "html")
    (tmp_path / artifact.folder / "records" / "00000.json").unlink()
    with pytest.raises(DataError, match="not one prompt was decoded"):
        report_text([artifact], "html")


def test_a_folder_that_is_not_there_is_named_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`foo/bar` was "an artifact of the stage 'foo'" under /foo, and `evaluate/x` was looked
    for in the root of the disk.
    """
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactMismatch, match="there is no artifact here") as caught:
        open_results(["foo/bar"])
    assert str(tmp_path / "foo") in str(caught.value)
    with pytest.raises(ArtifactMismatch, match="nothing was evaluated yet") as caught:
        open_results(["evaluate/x-1"])
    assert str(tmp_path / "evaluate") in str(caught.value)
