"""A task is a group of missing shards: transient failures are tried again, others are named,
and the store decides what is left.
"""

import errno
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from prefect import flow
from prefect.artifacts import Artifact
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client

from deepspec.artifacts.run import Run
from deepspec.artifacts.status import stage_status
from deepspec.config.recipes import load_run
from deepspec.errors import ConfigError, ShardsFailed
from deepspec.process import scopes
from deepspec.process.launch import RunRequest
from deepspec.process.progress_display import Progress
from deepspec.process.scopes import MARK
from flows.reporting import StageOutcome, watched_by
from flows.tasks import run_stages
from tests.answer_server import answer_server
from tests.conftest import write_jsonl
from tests.flows.conftest import SERVED, flaky_run, questions


@flow
def prompts_and_answers(source: str, overrides: tuple[str, ...] = ()) -> list[StageOutcome]:
    return run_stages(RunRequest(source, overrides), ("prompts", "answers"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose prompts and answers are done; each test that takes something away has it made
    again.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_file = flaky_run(tmp_path_factory.mktemp("finished"), monkeypatch)
        prompts_and_answers(str(run_file))
        calls(run_file)
        yield run_file


def answers_folder(run_file: Path) -> Path:
    return Path(stage_status(Run(load_run(str(run_file))), "answers").artifact_url)


def calls(run_file: Path) -> list[int]:
    """The shards that the engine worked on since the last look."""
    notes = run_file.parent / "calls"
    found = [int(line) for line in notes.read_text().split()] if notes.exists() else []
    notes.unlink(missing_ok=True)
    return found


@pytest.mark.long
def test_one_busy_shard_is_retried_one_bad_shard_is_named_and_the_next_run_does_it_alone(
    run_file: Path, caplog: pytest.LogCaptureFixture
):
    (run_file.parent / "broken").touch()
    with pytest.raises(ShardsFailed) as caught:
        prompts_and_answers(str(run_file))
    shown = str(caught.value)
    assert (
        "1 of 6 shards of the stage 'answers' failed: shard 5: the prompt cannot be rendered"
        in shown
    )
    assert f"`python -m deepspec answers {run_file} --shards 5`" in shown
    assert sorted(calls(run_file)) == [0, 1, 2, 3, 3, 4, 5], "shard 3 twice, shard 5 once"
    status = stage_status(Run(load_run(str(run_file))), "answers")
    assert (status.committed, status.missing) == (5, [5])
    assert "stage=answers shard=5 failed" in caplog.text, "a child's errors reach the run's log"
    assert set(re.findall(r"deepspec answers (\S+) --shards", caplog.text)) == {str(run_file)}, (
        "a child's own fix works, too"
    )
    stages = Artifact.get("flaky-stages")
    assert stages is not None and float(json.loads(str(stages.data))[-1]["seconds"]) > 0
    failure = Artifact.get("flaky-failure")
    assert (
        failure is not None
        and "| 5 | the prompt cannot be rendered | no, not as it is |" in str(failure.data)
    )
    assert f"```\npython -m deepspec answers {run_file} --shards 5\n```" in str(failure.data)

    (run_file.parent / "broken").unlink()
    outcomes = prompts_and_answers(str(run_file))
    assert calls(run_file) == [5]
    assert [outcome.state for outcome in outcomes] == ["already done", "done"]
    assert outcomes[1].status.sealed


@pytest.mark.slow
def test_where_too_many_shards_fail_for_good_the_rest_is_not_begun_and_what_was_made_is_kept(
    run_file: Path,
):
    write_jsonl(
        run_file.parent / "prompts.jsonl",
        [{"prompt": f"question {number}"} for number in range(24)],
    )
    hopeless = (
        "answers.engine=tests.flows.engines:Hopeless",
        "prompts.shard_rows=1",
        "resources.runner.shards_per_task=6",
    )
    with pytest.raises(ShardsFailed) as caught:
        prompts_and_answers(str(run_file), hopeless)
    shown = str(caught.value)
    assert (
        "11 of 24 shards of the stage 'answers' failed; 12 were not begun, "
        "because more failed for good than" in shown
    )
    assert (
        "shard 11: the prompt cannot be rendered" in shown
        and "shard 12" not in shown
        and "--shards 1-23" in shown
    )
    assert calls(run_file) == list(range(12))
    status = stage_status(Run(load_run(str(run_file), hopeless)), "answers")
    assert (status.committed, status.missing) == (1, list(range(1, 24)))
    with pytest.raises(ShardsFailed, match="22 were not begun, because more failed for good than"):
        prompts_and_answers(str(run_file), (*hopeless, "resources.retries.max_failed=0"))
    assert calls(run_file) == [1], "where none may fail, the first one ends it"


def test_where_nothing_is_missing_no_child_is_started(
    finished: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scopes.Scope, "start", lambda *_: pytest.fail("a child was started"))
    seen: list[Progress] = []
    with watched_by(seen.append):
        outcomes = prompts_and_answers(str(finished))
    assert [outcome.state for outcome in outcomes] == ["already done", "already done"]
    assert [(progress.stage, progress.state) for progress in seen] == [
        ("prompts", "already done"),
        ("answers", "already done"),
    ]


def test_hidden_states_that_training_makes_are_no_stage_to_run(
    finished: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scopes.Scope, "start", lambda *_: pytest.fail("a child was started"))
    outcomes = run_in_flow(str(finished), "resources.training.source=online")
    assert [outcome.state for outcome in outcomes] == [
        "already done",
        "already done",
        "in training",
    ]
    assert (outcomes[2].status.missing, outcomes[2].status.sealed) == ([], False)


def test_of_some_shards_only_the_missing_ones_are_made_and_the_stages_after_are_left_out(
    finished: Path,
):
    for shard in (1, 4):
        (answers_folder(finished) / "records" / f"0000{shard}.json").unlink()
    outcomes = some_shards(str(finished), "0-1,2")
    assert calls(finished) == [1]
    assert [(outcome.status.stage, outcome.state) for outcome in outcomes] == [
        ("prompts", "already done"),
        ("answers", "done"),
    ]
    assert outcomes[1].status.missing == [4], "of what is missing nothing is hidden"
    assert some_shards(str(finished), "0-2")[1].state == "already done" and calls(finished) == []
    assert prompts_and_answers(str(finished))[1].status.sealed and calls(finished) == [4]


@pytest.mark.parametrize(
    ("shards", "shown"),
    [("17", "has no shard 17; there are 0 to 5"), ("5-3", "'5-3' is not a shard")],
)
def test_shards_that_cannot_be_are_refused_before_any_work(
    finished: Path, shards: str, shown: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scopes.Scope, "start", lambda *_: pytest.fail("a child was started"))
    with pytest.raises(ConfigError, match=shown):
        some_shards(str(finished), shards)


@flow
def some_shards(source: str, shards: str) -> list[StageOutcome]:
    return run_stages(RunRequest(source), ("prompts", "answers", "hidden"), shards)


@flow
def run_in_flow(source: str, override: str, shards: str = "") -> list[StageOutcome]:
    return run_stages(RunRequest(source, (override,)), ("prompts", "answers", "hidden"), shards)


def test_losing_a_record_makes_that_shard_missing_and_no_other(finished: Path):
    (answers_folder(finished) / "records" / "00002.json").unlink()
    prompts_and_answers(str(finished))
    assert calls(finished) == [2]


def test_an_unsealed_stage_with_nothing_missing_is_sealed(finished: Path):
    (answers_folder(finished) / "manifest.json").unlink()
    assert prompts_and_answers(str(finished))[1].status.sealed
    assert calls(finished) == []


def test_where_some_shards_are_asked_for_and_the_manifest_alone_is_lost_the_stage_is_sealed(
    finished: Path,
):
    (answers_folder(finished) / "manifest.json").unlink()
    outcomes = run_in_flow(str(finished), "resources.training.source=online", shards="2")
    assert outcomes[1].status.sealed and outcomes[1].state == "done" and calls(finished) == []


def test_each_group_of_shards_has_its_log_beside_the_artifact(finished: Path):
    assert {"answers-0000-0002.log", "answers-0003-0005.log"} <= {
        path.name for path in (answers_folder(finished) / "logs").iterdir()
    }


def test_a_killed_child_is_tried_again(run_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        RunRequest, "command", kill_first_answers(RunRequest.command, run_file.parent / "killed")
    )
    outcomes = prompts_and_answers(str(run_file))
    assert (run_file.parent / "killed").exists()
    assert outcomes[1].status.sealed


@pytest.mark.long
def test_a_child_that_is_past_its_deadline_is_ended_with_its_server_and_what_it_made_is_kept(
    run_file: Path,
):
    questions(run_file, answered=(0,))
    late = (
        *SERVED,
        "resources.retries.times=0",
        "resources.runner.shards_per_task=6",
        "resources.retries.stages={answers: {deadline_minutes: 0.4}}",
    )
    with pytest.raises(ShardsFailed, match="shard 1: answers did not finish in time"):
        prompts_and_answers(str(run_file), late)
    assert [
        one.cmdline() for one in psutil.Process().children(recursive=True) if MARK in one.environ()
    ] == []
    status = stage_status(Run(load_run(str(run_file), late)), "answers")
    assert (status.committed, status.missing) == (1, [1, 2, 3, 4, 5])


def kill_first_answers(command, note: Path):
    """Command lines of which the first one for answers ends as if the kernel had killed it."""

    def changed(request: RunRequest, verb: str, shards=None) -> list[str]:
        if verb == "answers" and not note.exists():
            note.touch()
            return ["sh", "-c", "kill -9 $$"]
        return command(request, verb, shards)

    return changed


def test_a_child_that_cannot_start_fails_the_run_at_once_with_its_own_error(run_file: Path):
    with pytest.raises(ConfigError, match="the engine cannot be imported"):
        prompts_and_answers(str(run_file), ("answers.engine=tests.engines:Nobody",))


def test_a_wrong_request_is_refused_before_any_work(run_file: Path):
    with pytest.raises(ConfigError, match="seeed: there is no such field"):
        prompts_and_answers(str(run_file), ("answers.seeed=3",))
    assert not (run_file.parent / "store").exists()


def test_a_group_for_which_the_machine_has_no_process_is_tried_again(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
):
    start, refused = scopes.Scope.start, list[object]()

    def refusing(scope: scopes.Scope, command: Sequence[str], env: Mapping[str, str]) -> object:
        if "answers" in command and not refused:
            refused.append(command)
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(scope, command, env)

    monkeypatch.setattr(scopes.Scope, "start", refusing)
    assert prompts_and_answers(str(run_file))[1].status.sealed and refused


@pytest.mark.slow
def test_a_key_in_a_prefect_block_reaches_the_server_and_nothing_else(
    run_file: Path, caplog: pytest.LogCaptureFixture
):
    key = "sk-only-in-the-block"
    Secret(value=key).save("servers-key", overwrite=True)
    with answer_server(models=(), key=key) as server:
        ask = ("answers.engine=openai", f'resources.servers.endpoints=["{server.url}"]')
        with pytest.raises(ConfigError, match="no Secret block of this name"):
            prompts_and_answers(
                str(run_file), (*ask, "resources.servers.api_key_secret=no-such-block")
            )
        outcomes = prompts_and_answers(
            str(run_file), (*ask, "resources.servers.api_key_secret=servers-key")
        )
    assert outcomes[1].status.sealed and len(server.bodies) == 12
    assert [
        path
        for path in run_file.parent.rglob("*")
        if path.is_file() and key.encode() in path.read_bytes()
    ] == []
    assert key not in caplog.text
    # parameters, states, artifacts and logs, as anybody can read them
    with get_client(sync_client=True) as client:
        kept = [
            *client.read_flow_runs(),
            *client.read_task_runs(),
            *client.read_artifacts(),
            *client.read_logs(),
        ]
    assert not any(key in item.model_dump_json() for item in kept)
