"""The known benchmarks: their wordings give the golden prompts byte for byte, and a wrong name
is answered with the nearest right ones.
"""

import re
from string import Formatter

import pytest

from deepspec.artifacts.run import Run, benchmark_key
from deepspec.config.benchmarks import KNOWN, check_name, columns_of, find_benchmark, turns_of
from deepspec.config.recipes import load_run
from deepspec.errors import ConfigError, DataError
from deepspec.prompts.sources import read_file
from tests.conftest import SHARED

GOLDEN = sorted((SHARED / "eval_datasets").glob("*.jsonl"))
PROTOCOL = {
    "gsm8k": 500,
    "math500": 500,
    "aime25": 30,
    "humaneval": 164,
    "mbpp": 256,
    "livecodebench": 500,
    "mt-bench": 80,
    "alpaca": 500,
    "arena-hard-v2": 500,
}


def row_behind(name: str, turns: list[str]) -> dict:
    """The data set's row that a golden line was made from: the columns cut out of the first
    wording that fits it.
    """
    for wording in KNOWN[name].wordings:
        pattern = "".join(
            re.escape(text) + (f"(?P<{column}>.+)" if column else "")
            for text, column, _, _ in Formatter().parse(wording)
        )
        found = [re.fullmatch(pattern, turn, re.DOTALL) for turn in turns]
        if all(found):
            rows = [match.groupdict() for match in found if match]
            return (
                rows[0]
                if len(rows) == 1
                else {column: [row[column] for row in rows] for column in columns_of(wording)}
            )
    pytest.fail(f"no wording of {name} fits {turns[0][:80]!r}")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_golden_line_is_its_row_in_our_words(path):
    benchmark = KNOWN[path.stem]
    lines = [list(row["turns"]) for row in read_file(str(path))]
    assert [turns_of(benchmark, row_behind(benchmark.name, turns)) for turns in lines] == lines
    assert len(lines) >= (benchmark.num_prompts or 1)


def test_the_table_has_the_protocols_numbers_and_every_golden_file():
    assert {name: KNOWN[name].num_prompts for name in PROTOCOL} == PROTOCOL
    assert {path.stem for path in GOLDEN} <= set(KNOWN)


def test_a_change_of_the_table_makes_other_artifacts_and_must_be_meant():
    """The table is a YAML file, easily reflowed: one byte of a wording more would orphan the stored
    prompts of every store.
    """
    assert {name: benchmark_key(known).fingerprint for name, known in KNOWN.items()} == {
        "gsm8k": "6f49fc4fd564",
        "math500": "84477d60f4f5",
        "aime24": "86fde09572b8",
        "aime25": "ea05b39d9a2a",
        "humaneval": "f4d815c65153",
        "mbpp": "3883ddfd79d6",
        "lbpp": "ccfad5780c84",
        "livecodebench": "b8a9b8713738",
        "swe-bench": "650e1dacc94f",
        "mt-bench": "aa2e9adc8482",
        "alpaca": "92f1e2513f76",
        "arena-hard-v2": "7d6e5d6c6fa3",
    }


def test_a_row_is_worded_as_far_as_its_columns_are_filled():
    assert turns_of(KNOWN["alpaca"], {"instruction": "Sum up.", "input": "A text."}) == [
        "Sum up.\n\nInput:\nA text."
    ]
    assert turns_of(KNOWN["alpaca"], {"instruction": "Greet {me}.", "input": ""}) == ["Greet {me}."]
    code = turns_of(KNOWN["livecodebench"], {"question_content": "Q", "starter_code": "class S:"})[
        0
    ]
    assert (
        "### Question:\nQ\n\n### Format: Use the following code structure:\n"
        "```python\nclass S:\n```\n\n### Answer" in code
    )
    assert (
        "# YOUR CODE HERE"
        in turns_of(KNOWN["livecodebench"], {"question_content": "Q", "starter_code": ""})[0]
    )


def test_a_data_set_whose_columns_changed_is_refused_with_those_it_has():
    with pytest.raises(
        DataError, match=r"nothing in question, its columns are answer, query"
    ) as caught:
        turns_of(KNOWN["gsm8k"], {"query": "1 + 1?", "answer": "2"})
    assert "gsm8k@COMMIT" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "gsm8k",
        "gsm8k@main",
        "my.jsonl",
        "./anything",
        "s3://bucket/set.jsonl",
        "x.parquet",
        "demo/math",
    ],
)
def test_known_names_and_files_pass(name: str):
    assert check_name(name, others=["demo/math"]) == name


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "evaluate.benchmarks=[{name: gsm8}]",
            ["evaluate.benchmarks.0.name", "'gsm8'", "did you mean 'gsm8k'"],
        ),
        (
            "evaluate.benchmarks=[{name: gsm8k}, {name: mtbench}]",
            ["evaluate.benchmarks.1.name", "'mt-bench'"],
        ),
        ("evaluate.benchmarks=[{name: aime}]", ["'aime25'", "'aime24'"]),
        ("evaluate.benchmarks=[{name: demo/maths}]", ["did you mean 'demo/math'"]),
        ("evaluate.benchmarks=[{name: qqq}]", ["known are gsm8k, math500", "give a file"]),
        ("prompts.decontaminate=[arena-hard]", ["prompts.decontaminate", "'arena-hard-v2'"]),
    ],
)
def test_an_unknown_name_is_refused_when_the_run_is_read(override: str, said: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_run("demo", [override])
    assert all(words in str(caught.value) for words in said)
    assert "at least 1 item" not in str(caught.value)


def test_a_benchmark_is_named_by_what_decides_its_prompts():
    gsm8k = KNOWN["gsm8k"]
    pinned = find_benchmark("gsm8k@v1")
    assert pinned == gsm8k.model_copy(update={"revision": "v1"})
    others = [
        pinned,
        gsm8k.model_copy(update={"split": "train"}),
        gsm8k.model_copy(update={"wordings": ("{question}",)}),
        gsm8k.model_copy(update={"problem": None}),
    ]
    assert (
        len({benchmark_key(benchmark).fingerprint for benchmark in (gsm8k, *others) if benchmark})
        == 5
    )
    assert benchmark_key(
        gsm8k.model_copy(update={"num_prompts": 3, "domain": "other"})
    ) == benchmark_key(gsm8k)


def test_what_a_known_benchmark_is_by_default_is_part_of_a_results_name(
    monkeypatch: pytest.MonkeyPatch,
):
    run = load_run("demo", ["evaluate.benchmarks=[{name: gsm8k}]"])
    before = Run(run).artifact("evaluate").key.fingerprint
    monkeypatch.setitem(KNOWN, "gsm8k", KNOWN["gsm8k"].model_copy(update={"num_prompts": 3}))
    assert Run(run).artifact("evaluate").key.fingerprint != before


def test_revisions_are_whole_commits_or_left_open():
    assert all(
        benchmark.revision is None or re.fullmatch("[0-9a-f]{40}", benchmark.revision)
        for benchmark in KNOWN.values()
    )
