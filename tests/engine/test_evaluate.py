"""Drafts evaluated where they are served: a real vLLM counts what the decoding here counts."""

import json
import os
import shutil
from pathlib import Path

import pytest

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import results
from deepspec.evaluate.results import read_rows
from deepspec.evaluate.stage import run_evaluate
from deepspec.report.report import report_text
from tests.engine.conftest import small_run
from tests.engine.vllm import COMMAND, ENVIRONMENT, INTERPRETED, needs_vllm

pytestmark = [*needs_vllm, pytest.mark.timeout(900)]  # two servers, one of them interpreted
FEW = "evaluate.benchmarks=[{name: demo/math, limit: 3}, {name: demo/chat, limit: 2}]"
SERVED = (
    FEW,
    "evaluate.engine=vllm",
    "evaluate.concurrencies=[1, 3]",
    f"resources.servers.start_command={json.dumps(COMMAND)}",
)


@pytest.mark.parametrize(
    ("algorithm", "variables"),
    [("eagle3", {}), pytest.param("dspark", INTERPRETED, marks=pytest.mark.long)],
)
def test_a_served_draft_makes_the_tokens_and_rounds_of_the_decoding_here(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: str,
    variables: dict[str, str],
):
    for name, value in {**ENVIRONMENT, **variables}.items():
        monkeypatch.setenv(name, value, prepend=os.pathsep if name == "PYTHONPATH" else None)
    store = tmp_path / "store"
    shutil.copytree(trained, store)
    run = Run(small_run(store, *SERVED, algorithm=algorithm))
    own = read_rows(run_evaluate(Run(small_run(store, FEW, algorithm=algorithm))))
    artifact = run_evaluate(run)
    here = {(row["benchmark"], row["prompt"]): row for row in own}
    served = read_rows(artifact)
    assert len(served) == 2 * len(here)
    for row in served:
        same = here[row["benchmark"], row["prompt"]]
        assert row["prompt_digest"] == same["prompt_digest"]
        assert row["token_ids"] == same["token_ids"] and row["identical"]
        if row["batch_size"] == 1:
            assert len(row["proposed"]) == len(same["proposed"])
            assert sum(row["committed"]) == sum(same["committed"])
    for size in (1, 3):
        rounds = [row["proposed"] for row in served if row["batch_size"] == size]
        assert sum(map(len, rounds)) == sum(len(row["proposed"]) for row in own)
    block = run.config.draft.block_size if algorithm != "eagle3" else run.config.draft.ttt_length
    assert {count for row in served for count in row["proposed"]} == {block}
    found = results(run)
    assert [speed.batch_size for speed in found.batch_sizes] == [1, 3]
    text = report_text([artifact], "markdown")
    line = next(line for line in text.splitlines() if line.startswith("| all rounds"))
    assert line.endswith("agree |") and "Likely causes" not in text
