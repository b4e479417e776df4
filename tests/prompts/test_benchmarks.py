"""Benchmarks on their way into the store: read from their data set once, named by it, the same
for whoever comes later.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import lineage_lines
from deepspec.artifacts.run import Run, benchmark_key
from deepspec.artifacts.verify import verify_all
from deepspec.config.benchmarks import KNOWN, find_benchmark
from deepspec.errors import DataError
from deepspec.prompts.benchmarks import BenchmarkPrompt, read_benchmark, stored_benchmark
from deepspec.prompts.stage import run_prompts
from tests.conftest import REPOSITORY, tiny_run, write_jsonl
from tests.prompts.hub import COMMIT, hub_of

STEPS = "\nPlease reason step by step, and put your final answer within \\boxed{}."
CARD = (
    "---\nconfigs:\n- config_name: main\n  data_files:\n"
    "  - split: test\n    path: main/test-*\n---\n"
)


@pytest.fixture
def gsm8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local data set of gsm8k's shape (subset, split and columns) in the place of the hub's."""
    folder = tmp_path / "gsm8k"
    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    rows = [
        {"question": f"What is {number} + {number}?", "answer": "#### 2"} for number in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "main" / "test-00000-of-00001.parquet")
    monkeypatch.setitem(
        KNOWN, "gsm8k", KNOWN["gsm8k"].model_copy(update={"dataset": str(folder), "revision": None})
    )
    return folder


def test_a_known_benchmark_is_read_from_its_data_set_once_and_from_the_store_from_then_on(
    gsm8k: Path, tmp_path: Path
):
    config = tiny_run(tmp_path / "store")
    prompts = read_benchmark(Run(config), "gsm8k")
    assert len(prompts) == 5
    assert prompts[1] == BenchmarkPrompt((f"What is 1 + 1?{STEPS}",), "What is 1 + 1?")
    shutil.rmtree(gsm8k)  # as on a machine without a network
    assert (
        read_benchmark(
            Run(tiny_run(tmp_path / "store", "evaluate.seed=9", recipe="dflash-demo")), "gsm8k"
        )
        == prompts
    )


def test_it_is_an_artifact_like_any_other_and_tells_its_data_set(gsm8k: Path, tmp_path: Path):
    config = tiny_run(tmp_path / "store")
    artifact = stored_benchmark(Run(config), KNOWN["gsm8k"])
    manifest = artifact.manifest()
    assert manifest is not None
    assert (manifest.totals["shards"], manifest.totals["rows"]) == (1, 5)
    (line,) = lineage_lines(artifact)
    assert line.startswith(
        f"benchmarks/gsm8k-{artifact.key.fingerprint}  (digest {manifest.digest}, 5 rows"
    )
    assert line.endswith(f"data set {gsm8k})")


def test_damage_is_found_and_the_same_prompts_are_read_again(gsm8k: Path, tmp_path: Path):
    config = tiny_run(
        tmp_path / "store", "evaluate.benchmarks=[{name: gsm8k}]", "prompts.decontaminate=[gsm8k]"
    )
    artifact = stored_benchmark(Run(config), KNOWN["gsm8k"])
    before, record = artifact.manifest(), artifact.records()[0]
    assert before is not None
    artifact.store.write(artifact.path(record.file), b"torn")
    (problem,) = verify_all(Run(config), {})
    assert "shard 0" in problem
    assert len(read_benchmark(Run(config), "gsm8k")) == 5
    after = artifact.manifest()
    assert after is not None
    assert after.digest == before.digest
    assert list(verify_all(Run(config), {})) == []


def test_prompts_that_are_stored_but_not_sealed_need_no_network(gsm8k: Path, tmp_path: Path):
    """A worker killed between commit and seal (or `verify`, which removes a damaged manifest)
    sent the next one to the hub again.
    """
    config = tiny_run(tmp_path / "store")
    artifact = stored_benchmark(Run(config), KNOWN["gsm8k"])
    artifact.store.remove(artifact.path("manifest.json"))
    shutil.rmtree(gsm8k)
    assert len(read_benchmark(Run(config), "gsm8k")) == 5
    assert artifact.manifest() is not None


def test_a_benchmark_of_files_reads_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "lcb"
    folder.mkdir()
    known = KNOWN["livecodebench"]
    for number, file in enumerate(known.files):
        row = {
            "question_content": f"Task {number}",
            "starter_code": "class S:" if number else "",
            "private_test_cases": "x" * 1000,
        }
        write_jsonl(folder / file, [row])
    monkeypatch.setitem(KNOWN, "livecodebench", known.model_copy(update={"dataset": str(folder)}))
    prompts = read_benchmark(Run(tiny_run(tmp_path / "store")), "livecodebench")
    assert [prompt.problem for prompt in prompts] == [f"Task {number}" for number in range(6)]
    assert ["# YOUR CODE HERE" in prompt.turns[0] for prompt in prompts] == [True] + 5 * [False]


def test_both_turns_of_a_list_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "set").mkdir()
    write_jsonl(
        tmp_path / "set" / "train.jsonl",
        [{"prompt": ["Write a post.", "Rewrite {it}."], "category": "writing"}],
    )
    monkeypatch.setitem(
        KNOWN, "mt-bench", KNOWN["mt-bench"].model_copy(update={"dataset": str(tmp_path / "set")})
    )
    assert read_benchmark(Run(tiny_run(tmp_path / "store")), "mt-bench") == [
        BenchmarkPrompt(("Write a post.", "Rewrite {it}."))
    ]


@pytest.mark.parametrize("name", ["arena-hard-v2", "lbpp@v1", "math500"])
def test_a_hub_that_cannot_be_reached_is_told_with_what_to_do(tmp_path: Path, name: str):
    """The suite runs with HF_HUB_OFFLINE."""
    known = find_benchmark(name)
    assert known is not None
    with pytest.raises(DataError) as caught:
        read_benchmark(Run(tiny_run(tmp_path / "store")), name)
    for words in (f"benchmark {known.name}", "ffline", known.dataset, "network", "JSONL file"):
        assert words in str(caught.value)


def test_a_network_that_is_down_is_no_stack_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A lost connection is an error of the hub's HTTP client, and neither an OSError nor a
    ValueError.
    """
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="benchmark lbpp: cannot be loaded"):
        read_benchmark(Run(tiny_run(tmp_path / "store")), "lbpp")


def test_an_unpinned_benchmark_stays_with_its_commit_and_a_pinned_one_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The hub cannot be reached by a test: what it would say stands in for it."""
    commits, read = iter(["aaa", "bbb"]), []

    def load_dataset(
        name: str, subset: str | None, *, split: str, revision: str, streaming: bool
    ) -> list[dict]:
        read.append((name, subset, split, revision))
        return [{"question": "How many?", "answer": "1"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("deepspec.prompts.sources.newest_revision", lambda source: next(commits))
    monkeypatch.setitem(KNOWN, "gsm8k", KNOWN["gsm8k"].model_copy(update={"revision": None}))
    config = tiny_run(tmp_path / "store")
    artifact = stored_benchmark(Run(config), KNOWN["gsm8k"])
    artifact.store.remove(artifact.path("records/00000.json"))
    stored_benchmark(Run(config), KNOWN["gsm8k"])
    assert read == [("openai/gsm8k", "main", "test", "aaa")] * 2
    assert "gsm8k@aaa" in caplog.text
    assert next(lineage_lines(artifact)).endswith("data set openai/gsm8k at aaa)")
    read_benchmark(Run(config), "gsm8k@v1")
    assert read[2:] == [("openai/gsm8k", "main", "test", "v1")]
    pinned = Artifact(
        Run(config).store, benchmark_key(KNOWN["gsm8k"].model_copy(update={"revision": "v1"}))
    )
    assert next(lineage_lines(pinned)).endswith("data set openai/gsm8k at v1)")


def test_another_folder_of_the_same_name_is_not_taken_for_this_one(
    gsm8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`datasets` took the rows that it had kept of the first: of a folder with a card it knows
    only the name.
    """
    other = tmp_path / "other" / "gsm8k"
    shutil.copytree(gsm8k, other)
    pq.write_table(
        pa.Table.from_pylist([{"question": "Which?"}]),
        other / "main" / "test-00000-of-00001.parquet",
    )
    config = tiny_run(tmp_path / "store")
    assert len(read_benchmark(Run(config), "gsm8k")) == 5
    monkeypatch.setitem(KNOWN, "gsm8k", KNOWN["gsm8k"].model_copy(update={"dataset": str(other)}))
    assert [prompt.problem for prompt in read_benchmark(Run(config), "gsm8k")] == ["Which?"]


def benchmarks_verb(
    endpoint: str, folder: Path, *names: str, offline: str = "0"
) -> subprocess.CompletedProcess[str]:
    """`python -m deepspec benchmarks` with another hub, as its own process: the hub's address
    is read once, on import.
    """
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(folder / "hf"),
    }
    chosen = json.dumps([{"name": name} for name in names])
    command = [
        sys.executable,
        "-m",
        "deepspec",
        "benchmarks",
        "demo",
        "--store",
        str(folder / "store"),
    ]
    return subprocess.run(
        [
            *command,
            "--set",
            f"evaluate.benchmarks={chosen}",
            "--set",
            "resources.storage.min_free_gb=0",
        ],
        env=env,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_the_verb_reads_splits_and_files_from_a_hub_at_one_commit_and_then_asks_no_hub(
    tmp_path: Path,
):
    sets = tmp_path / "sets"
    for folder in (
        "openai/gsm8k/main",
        "lmarena-ai/arena-hard-auto/data/arena-hard-v2.0",
        "CohereLabs/lbpp/python",
    ):
        (sets / folder).mkdir(parents=True)
    (sets / "openai/gsm8k/README.md").write_text(CARD)
    pq.write_table(
        pa.Table.from_pylist([{"question": "How many?", "answer": "1"}]),
        sets / "openai/gsm8k/main/test-00000-of-00001.parquet",
    )
    write_jsonl(
        sets / "lmarena-ai/arena-hard-auto/data/arena-hard-v2.0/question.jsonl",
        [{"uid": "x", "prompt": "Write a poem."}] * 2,
    )
    pq.write_table(
        pa.Table.from_pylist([{"instruction": "Sort a list.", "completion": ""}]),
        sets / "CohereLabs/lbpp/python/test.parquet",
    )
    names = ("gsm8k", "arena-hard-v2", f"lbpp@{'c' * 40}")
    with hub_of(sets) as (endpoint, asked):
        done = benchmarks_verb(endpoint, tmp_path, *names)
        resolved = [line for line in asked if "/resolve/" in line]
        missing = benchmarks_verb(endpoint, tmp_path, "math500")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is in the store") == 3
    assert f"arena-hard-v2@{COMMIT}" in done.stderr
    assert resolved
    commits = {
        "openai/gsm8k": KNOWN["gsm8k"].revision or "",
        "arena-hard": COMMIT,
        "lbpp": "c" * 40,
    }
    assert [
        line
        for line in resolved
        if not any(name in line and commit in line for name, commit in commits.items())
    ] == []
    assert missing.returncode == 2
    assert "benchmark math500: cannot be loaded" in missing.stderr
    config = tiny_run(tmp_path / "store")
    assert [prompt.problem for prompt in read_benchmark(Run(config), "gsm8k")] == ["How many?"]
    assert read_benchmark(Run(config), "arena-hard-v2") == [BenchmarkPrompt(("Write a poem.",))] * 2
    assert read_benchmark(Run(config), names[2]) == [BenchmarkPrompt(("Sort a list.",))]
    assert benchmarks_verb("http://127.0.0.1:9", tmp_path, *names, offline="1").returncode == 0


def test_a_data_set_of_other_columns_leaves_nothing_that_counts(gsm8k: Path, tmp_path: Path):
    pq.write_table(
        pa.Table.from_pylist([{"query": "?"}]), gsm8k / "main" / "test-00000-of-00001.parquet"
    )
    with pytest.raises(DataError, match="nothing in question"):
        read_benchmark(Run(tiny_run(tmp_path / "store")), "gsm8k")
    assert (
        Artifact(Run(tiny_run(tmp_path / "store")).store, benchmark_key(KNOWN["gsm8k"])).manifest()
        is None
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ('{"turns": ["a"]}\n\n{"turns": []}\n', "line 3"),
        ('{"turns": ["a"]}\n{"turns": ["b", " "]}\n', "line 2"),
        ('{"turns": "abc"}\n', "line 1"),
        ('{"turns": ["a"]}\n{"turns"\n', "line 2"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused_with_its_line(tmp_path: Path, text: str, said: str):
    (tmp_path / "b.jsonl").write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read_benchmark(Run(tiny_run(tmp_path / "store")), str(tmp_path / "b.jsonl"))
    assert "b.jsonl" in str(caught.value)


def test_training_prompts_that_are_a_known_benchmarks_are_dropped_with_and_without_its_words(
    gsm8k: Path, store: Path, tmp_path: Path
):
    """Trap A7: a training set has the bare problem, the benchmark says more around it."""
    said = ["what is 1 + 1", f"What is 2 + 2?{STEPS}", "What is 7 + 7?"]
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in said])
    source = json.dumps({"kind": "files", "paths": [str(path)]})
    config = tiny_run(
        store, f"prompts.source={source}", "prompts.decontaminate=[gsm8k]", "prompts.max_rejected=0"
    )
    artifact = run_prompts(Run(config))
    (record,) = artifact.records().values()
    assert (record.rows, record.counts["benchmark"]) == (1, 2)
    rejects = [
        json.loads(line)["detail"]
        for line in artifact.store.read(artifact.path("rejects/00000.jsonl")).decode().splitlines()
    ]
    assert rejects == ["it is a prompt of gsm8k"] * 2
    manifest = artifact.manifest()
    assert manifest is not None
    assert [name.split("/")[0] for name in manifest.inputs] == ["benchmarks"]
    assert any(
        "benchmarks/gsm8k" in line and str(gsm8k) in line for line in lineage_lines(artifact)
    )


def test_runs_of_other_targets_share_a_benchmark_and_another_revision_is_another_result(
    tmp_path: Path,
):
    names = ["gsm8k", "gsm8k@v1", "gsm8k@v2"]
    runs = [
        tiny_run(
            tmp_path, f"evaluate.benchmarks=[{{name: {name}}}]", f"prompts.decontaminate=[{name}]"
        )
        for name in names
    ]
    for stage in ("prompts", "evaluate"):
        assert len({Run(run).artifact(stage).key.fingerprint for run in runs}) == 3
    inputs = [
        {
            entry.fingerprint
            for entry in Run(run).artifact("evaluate").key.inputs
            if entry.stage == "benchmarks"
        }
        for run in runs
    ]
    dflash = tiny_run(tmp_path, "evaluate.benchmarks=[{name: gsm8k}]", recipe="dflash-demo")
    assert {
        entry.fingerprint
        for entry in Run(dflash).artifact("evaluate").key.inputs
        if entry.stage == "benchmarks"
    } == inputs[0]
