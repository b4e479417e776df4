"""The benchmarks that are known by name, a record each: the data set, the words around each of its
rows, how many prompts.

A wording's braces hold columns of the data set; everything else in it is said to the target as it
stands here. Nothing here reads a data set: that is `data/benchmarks.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from string import Formatter
from typing import Any, Literal, NamedTuple

from deepspec.errors import DataError

Domain = Literal["math", "code", "chat", "other"]


class BenchmarkSet(NamedTuple):
    name: str
    dataset: str  # name on the hub
    domain: Domain
    wordings: tuple[str, ...]  # of a row the first one counts of whose columns none is empty
    num_prompts: int | None  # that the protocol of the published drafts takes; None is all
    subset: str | None = None
    split: str = "test"
    files: tuple[str, ...] = ()  # read one by one, in place of subset and split
    # the column whose text, in a training set, would be the benchmark's problem
    problem: str | None = None
    # commit or tag; None reads the newest commit, says which, and stays with it
    revision: str | None = None

    def recipe(self) -> dict[str, Any]:
        """Everything that decides what its prompts are, as JSON has it."""
        fields = self._asdict() | {"wordings": list(self.wordings), "files": list(self.files)}
        return {key: value for key, value in fields.items() if key not in ("domain", "num_prompts")}


STEP_BY_STEP = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
PYTHON_PROGRAM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a correct Python "
    "program that matches the specification and passes all tests. You will NOT return anything except for the program\n\n"
    "### Question:\n{question_content}\n\n"
)
IN_BACKTICKS = "\n```\n\n### Answer: (use the provided format with backticks)"
# A problem's own line breaks (\r\n in livecodebench and swe-bench), drawings (LaTeX in aime25) and
# examples are the data set's.
SETS = (
    BenchmarkSet(
        "gsm8k",
        "openai/gsm8k",
        "math",
        ("{question}" + STEP_BY_STEP,),
        500,
        subset="main",
        problem="question",
        revision="cc7b047b6e5bb11b4f1af84efc572db110a51b3c",
    ),
    BenchmarkSet(
        "math500",
        "HuggingFaceH4/MATH-500",
        "math",
        ("{problem}" + STEP_BY_STEP,),
        500,
        problem="problem",
        revision="ff5b20257d8185524591543f8ff5993951537bb8",
    ),
    BenchmarkSet(
        "aime24",
        "HuggingFaceH4/aime_2024",
        "math",
        ("{problem}" + STEP_BY_STEP,),
        None,
        split="train",
        problem="problem",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    ),
    BenchmarkSet(
        "aime25",
        "MathArena/aime_2025",
        "math",
        ("{problem}" + STEP_BY_STEP,),
        30,
        split="train",
        problem="problem",
        revision="c94da77eb22bbd6439e62a323bec18493a421302",
    ),
    BenchmarkSet(
        "humaneval",
        "openai/openai_humaneval",
        "code",
        # The column ends with a line break of its own, so an empty line stands before the closing
        # backticks.
        (
            "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```",
        ),
        164,
        problem="prompt",
        revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    ),
    BenchmarkSet(
        "mbpp",
        "google-research-datasets/mbpp",
        "code",
        ("{prompt}",),
        256,
        subset="sanitized",
        revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    ),
    BenchmarkSet(
        "lbpp", "CohereLabs/lbpp", "code", ("{instruction}",), None, files=("python/test.parquet",)
    ),
    BenchmarkSet(
        "livecodebench",
        "livecodebench/code_generation_lite",
        "code",
        (
            PYTHON_PROGRAM
            + "### Format: Use the following code structure:\n```python\n{starter_code}"
            + IN_BACKTICKS,
            PYTHON_PROGRAM
            + "### Format: Write your code in the following format:\n```python\n# YOUR CODE HERE"
            + IN_BACKTICKS,
        ),
        500,
        problem="question_content",
        revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
        # release_v6, 1,055 problems: each file has what its release added. The tests beside the
        # problems make them 4.5 GB.
        files=("test.jsonl", *(f"test{release}.jsonl" for release in range(2, 7))),
    ),
    BenchmarkSet(
        "swe-bench",
        "princeton-nlp/SWE-bench_Lite",
        "code",
        ("Problem Statement:\n{problem_statement}\nPlease fix the issue described above.",),
        None,
        problem="problem_statement",
        revision="6ec7bb89b9342f664a54a6e0a6ea6501d3437cc2",
    ),
    BenchmarkSet(
        # a list: two turns
        "mt-bench",
        "HuggingFaceH4/mt_bench_prompts",
        "chat",
        ("{prompt}",),
        80,
        split="train",
        revision="e3a795c5e9a82ee40611c416b8a7786c73198991",
    ),
    BenchmarkSet(
        "alpaca",
        "tatsu-lab/alpaca",
        "chat",
        ("{instruction}\n\nInput:\n{input}", "{instruction}"),
        500,
        split="train",
        revision="dce01c9b08f87459cf36a430d809084718273017",
    ),
    # 500 hard prompts and 250 of creative writing.
    BenchmarkSet(
        "arena-hard-v2",
        "lmarena-ai/arena-hard-auto",
        "chat",
        ("{prompt}",),
        500,
        files=("data/arena-hard-v2.0/question.jsonl",),
    ),
)
KNOWN = {benchmark.name: benchmark for benchmark in SETS}
DEMO = ("demo/math", "demo/code", "demo/chat")
FILES = (".jsonl", ".json", ".parquet")


def find_benchmark(name: str) -> BenchmarkSet | None:
    """The known benchmark that `name` or `name@revision` stands for; None for a demo's
    benchmark or a file.
    """
    bare, _, revision = name.partition("@")
    known = KNOWN.get(bare)
    return known._replace(revision=revision) if known and revision else known


def short_name(name: str) -> str:
    """What a benchmark is called in results: its known name, or its file's."""
    known = find_benchmark(name)
    return known.name if known else PurePath(name).stem


def check_name(name: str, *, others: Iterable[str] = ()) -> str:
    """The name as it is, if it is known (or one of `others`) or can be a file's.

    Raises:
        ValueError: it is neither; the nearest known names are named.
    """
    known = [*KNOWN, *others]
    demo = name.startswith("demo/")
    if (
        find_benchmark(name)
        or name in known
        or (not demo and ("/" in name or PurePath(name).suffix in FILES))
    ):
        return name
    close = difflib.get_close_matches(name.partition("@")[0], known, n=3, cutoff=0.5)
    meant = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"there is no benchmark {name!r}{meant}; known are {', '.join(known)}, or give a file ({', '.join(FILES)})"
    )


def turns_of(benchmark: BenchmarkSet, row: Mapping[str, Any]) -> list[str]:
    """What the user says, turn by turn: a row of the data set in the first wording whose columns it
    fills.

    Raises:
        DataError: it fills none; the columns that it has are named.
    """
    for wording in benchmark.wordings:
        values = {column: row.get(column) for column in columns_of(wording)}
        if all(values.values()):
            (column, value), *more = values.items()
            if isinstance(value, list) and not more:
                return [wording.format_map({column: turn}) for turn in value]
            return [wording.format_map(values)]
    what = f"a row has nothing in {' or '.join(columns_of(benchmark.wordings[-1]))}, its columns are {', '.join(sorted(row)) or 'none'}"
    where = f"benchmark {benchmark.name}, data set {benchmark.dataset}"
    raise DataError(
        what,
        where=where,
        fix=f"name a revision that has it ({benchmark.name}@COMMIT), or give the prompts as a JSONL file",
    )


def columns_of(wording: str) -> list[str]:
    return [column for _, column, _, _ in Formatter().parse(wording) if column]
