"""One Prefect server for all flow tests; library tests never pay for it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import yaml
from prefect.settings import (
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    temporary_settings,
)
from prefect.testing import utilities

from tests.conftest import REPOSITORY, TINY, made_once, write_jsonl

# The tiny demo where only the way through all stages counts.
BENCHMARKS = ", ".join(f"{{name: demo/{domain}, limit: 1}}" for domain in ("math", "code", "chat"))
QUICK = [
    *TINY,
    "prompts.limit=8",
    "train.max_steps=2",
    "evaluate.temperatures=[0.0]",
    f"evaluate.benchmarks=[{BENCHMARKS}]",
]

# Answers from a server of the target that each lane starts for itself; it answers what `questions`
# says.
SERVER = json.dumps([sys.executable, "-m", "tests.answer_server", "{port}", "{name}"])
SERVED = (
    "answers.engine=openai",
    "resources.servers.start=vllm",
    f"resources.servers.start_command={SERVER}",
)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of Prefect's, to be copied: making its tables takes a server half of
    its start.
    """

    def make(folder: Path) -> None:
        folder.mkdir()
        made = f"sqlite+aiosqlite:///{folder}/prefect.db"
        env = {
            **os.environ,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": made,
            "PREFECT_HOME": str(folder),
        }
        command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        subprocess.run(command, env=env, check=True, capture_output=True)

    return made_once(tmp_path_factory, "prefect-home", make) / "prefect.db"


@pytest.fixture(autouse=True, scope="session")
def prefect_server(database: Path) -> Iterator[None]:
    def folder_with_database() -> str:
        folder = tempfile.mkdtemp()
        shutil.copy(database, Path(folder, "prefect-test.db"))
        return folder

    quiet, quick = (
        {PREFECT_SERVER_ANALYTICS_ENABLED: False},
        {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None},
    )
    with pytest.MonkeyPatch.context() as monkeypatch, temporary_settings(quiet):
        monkeypatch.setattr(utilities, "mkdtemp", folder_with_database)
        with utilities.prefect_test_harness(server_startup_timeout=180), temporary_settings(quick):
            yield


def home_with(database: Path, home: Path) -> Path:
    """A folder for PREFECT_HOME."""
    home.mkdir()
    shutil.copy(database, home)
    return home


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose answers come from the test engine `Flaky`: six shards in two groups, no model
    anywhere.
    """
    return flaky_run(tmp_path, monkeypatch)


def flaky_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLAKY_DIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    prompts = write_jsonl(
        folder / "prompts.jsonl", [{"prompt": f"question {number}"} for number in range(12)]
    )
    benchmark = write_jsonl(folder / "benchmark.jsonl", [{"turns": ["hello"]}])
    fields = {
        "recipe": "demo",
        "name": "flaky",
        "store": str(folder / "store"),
        "demo": None,
        "target": {"model": "nobody/none"},
        "prompts": {
            "source": {"kind": "files", "paths": [str(prompts)]},
            "shard_rows": 2,
            "limit": None,
        },
        "answers": {"engine": "tests.engines:Flaky"},
        "evaluate": {"benchmarks": [{"name": str(benchmark)}]},
        "resources": {
            "runner": {"shards_per_task": 3},
            "retries": {"delay_s": 0.05},
            "storage": {"min_free_gb": 0},
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def questions(run_file: Path, *, answered: Sequence[int]) -> None:
    """Prompts for six shards, of which a server of `SERVED` answers these and none of the
    others, for which it is waited.
    """
    shown = [
        f"question {row}" if row // 2 in answered else f"wait for ever {row}" for row in range(12)
    ]
    write_jsonl(run_file.parent / "prompts.jsonl", [{"prompt": prompt} for prompt in shown])
