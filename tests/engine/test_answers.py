"""Answers of a real vLLM: those of this process, whatever the rows hold and whoever dies."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepspec.answers.stage import run_answers
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.config.run import RunConfig
from deepspec.errors import ChildFailed, ShardsFailed
from deepspec.hidden.sequences import capture_rows
from deepspec.prompts.stage import run_prompts
from deepspec.target.chat import load_chat
from tests.engine.conftest import small_run
from tests.engine.vllm import COMMAND, ENVIRONMENT, needs_vllm, serving
from tests.processes import marked
from tests.target.chat_templates import QWEN3

pytestmark = [*needs_vllm, pytest.mark.timeout(900)]

NUM_ROWS, NUM_WITH_TOOLS = 192, 12
MARK = "TEST_SERVE"  # in the environment of a test's servers
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {"type": "object", "properties": {"b": {"type": "number"}, "a": {}}},
        },
    }
]
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def answers_run(store: Path, *settings: str) -> RunConfig:
    source = json.dumps({"kind": "files", "paths": [str(store / "prompts.jsonl")]})
    return small_run(store, f"prompts.source={source}", "prompts.limit=null", *settings)


@pytest.fixture(scope="module")
def asked(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose target has a template with tools, and prompts: some with tools, one too long
    for the target.
    """
    store = tmp_path_factory.mktemp("answers") / "store"
    shutil.copytree(prepared, store)
    (target,) = store.glob("demo/*/target")
    (target / "chat_template.jinja").write_text(QWEN3)
    prompts = Run(small_run(store)).artifact("prompts")
    texts = [
        json.loads(row["messages"])[0]["content"]
        for record in prompts.records().values()
        for row in prompts.rows(record)
    ]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts[: NUM_ROWS - 1]]
    for number, row in enumerate(rows[:NUM_WITH_TOOLS]):
        row["tools"] = TOOLS
        if number % 2:
            called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
            result = {"role": "tool", "content": "3", "tool_call_id": "1"}
            row["messages"] += [called, result]
    rows.append({"messages": [{"role": "user", "content": "word " * 2000}]})
    (store / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_prompts(Run(answers_run(store)))
    return store


@pytest.fixture(scope="module")
def expected(asked: Path) -> dict[int, list[dict]]:
    """The answers of this process."""
    return turns_of(run_answers(Run(answers_run(asked))))


def turns_of(artifact: Artifact) -> dict[int, list[dict]]:
    """Of every row its turns, without what names the server; none twice, and the long one alone
    rejected.
    """
    records = artifact.records().values()
    rows = [row for record in records for row in artifact.rows(record)]
    found = {
        row["id"]: [
            turn | {"seed": 0, "endpoint": None, "served_model": None} for turn in row["turns"]
        ]
        for row in rows
    }
    assert len(found) == len(rows) == NUM_ROWS - 1
    rejects = [
        json.loads(line)
        for path in Path(artifact.store.root, artifact.folder, "rejects").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert [reject["reason"] for reject in rejects] == ["too_long"]
    return found


def served_run(store: Path, *settings: str) -> RunConfig:
    """Not one row may be refused, nor one prompt read otherwise."""
    strict = ("resources.servers.max_refused=0", "resources.servers.max_differing_prompts=0")
    return answers_run(store, "answers.engine=openai", *strict, *settings)


def started(*options: str) -> tuple[str, str]:
    command = json.dumps([*COMMAND, *options])
    return "resources.servers.start=vllm", f"resources.servers.start_command={command}"


@pytest.fixture
def marking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The mark in the environment of servers that the test starts."""
    for name, value in {**ENVIRONMENT, MARK: str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    return str(tmp_path)


@pytest.mark.long
def test_a_vllm_killed_amid_its_answers_is_started_again_and_every_row_comes_once(
    asked: Path, expected: dict[int, list[dict]], marking: str
):
    """Token for token those of this process at temperature 0, from two servers."""
    killed = list[int]()

    def kill_once(event: dict) -> None:
        if event["event"] == "answering" and 20 <= event["rows"] < NUM_ROWS and not killed:
            (server,) = (
                process
                for process in marked(MARK, marking, "vllm serve")
                if "supervisor" not in " ".join(process.cmdline())
            )
            killed.append(server.pid)
            os.kill(server.pid, signal.SIGKILL)

    settings = ("resources.servers.progress_s=0.02", "resources.servers.requests=8")
    run = Run(served_run(asked, *started(), *settings))
    assert turns_of(run_answers(run, report=kill_once)) == expected
    assert len(killed) == 1
    assert marked(MARK, marking, "vllm") == []


@pytest.mark.long
def test_a_vllm_that_dies_at_load_is_one_error_with_what_it_died_of(asked: Path, marking: str):
    """Of its 160 lines the last 40 are frames of a process that knows no more than that."""
    run = Run(served_run(asked, *started("--num-gpu-blocks-override", "1"), "answers.seed=1"))
    with pytest.raises(ChildFailed) as caught:
        run_answers(run)
    assert "No available memory for the cache blocks" in caught.value.what
    assert marked(MARK, marking, "vllm") == []


@pytest.fixture(scope="module")
def endpoint(asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    (target,) = asked.glob("demo/*/target")
    with serving(target, tmp_path_factory.mktemp("serve") / "log") as url:
        yield f'resources.servers.endpoints=["{url}/v1"]'


NAME = "resources.servers.model_name=target"


def test_a_vllm_that_somebody_started_answers_the_same(
    asked: Path, expected: dict[int, list[dict]], endpoint: str
):
    """Rows with tools among them, which it refuses without `tool_choice`."""
    config = served_run(asked, endpoint, NAME)
    run = Run(config)
    run.store.remove(run.artifact("answers").folder)  # the engine's that was started above
    artifact = run_answers(run)
    assert turns_of(artifact) == expected
    # capture has the prompts that vLLM read, in which tools have another order than in the row
    rows = [row for record in artifact.records().values() for row in artifact.rows(record)]
    with_tools = [row for row in rows if row["tools"]]
    assert len(with_tools) == NUM_WITH_TOOLS
    chat = load_chat(run)
    samples = {one.sample_id: one for one in capture_rows(rows, chat, config.hidden).rows}
    for row in with_tools:
        (turn,) = row["turns"]
        whole = turn["prompt_token_ids"] + turn["token_ids"]
        assert samples[row["id"]].input_ids == whole
        assert '{"type": "function", "function": {"name"' in chat.tokenizer.decode(whole)


def test_an_answer_gets_what_is_left_of_the_context(asked: Path, endpoint: str):
    """vLLM refuses a limit that is larger than its context alone is, and a retry has no more."""
    larger = ("answers.truncated=retry", "answers.retry_max_new_tokens=4000")
    run = Run(served_run(asked, endpoint, NAME, "answers.max_new_tokens=2000", *larger))
    artifact = run_answers(run, shards=[3])
    turns = [turn for row in artifact.rows(artifact.records()[3]) for turn in row["turns"]]
    assert len(turns) == 47
    for turn in turns:
        assert turn["num_prompt_tokens"] + turn["num_tokens"] <= 1024


def test_a_vllm_with_another_template_is_found_by_its_first_answers(asked: Path, endpoint: str):
    (target,) = asked.glob("demo/*/target")
    changed = QWEN3.replace("<think>\n\n</think>\n\n", "<think>\n</think>\n")
    assert changed != QWEN3
    (target / "chat_template.jinja").write_text(changed)
    try:
        with pytest.raises(ShardsFailed, match="at position") as caught:
            run_answers(Run(served_run(asked, endpoint, NAME, "answers.seed=2")), shards=[0])
    finally:
        (target / "chat_template.jinja").write_text(QWEN3)
    assert "1 of 48 so far" in str(caught.value)
