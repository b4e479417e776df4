"""What is stored of a shard of answers, and when it is not stored."""

from pathlib import Path

import pytest

from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.errors import ShardsFailed
from deepspec.prompts.stage import run_prompts
from tests.answer_server import always, answer_server
from tests.answers.asking import ask, row, server_run


@pytest.mark.parametrize(("setting", "kept"), [("keep", 1), ("drop", 0)])
def test_truncated_answers_are_known_as_such(store: Path, setting: str, kept: int):
    with answer_server(always("truncate")) as server:
        answered, rejects = ask(
            server_run(store, server.url, settings=(f"answers.truncated={setting}",)), row(1, "abc")
        )
    assert (len(answered), len(rejects)) == (kept, 1 - kept)
    assert all(turn["finish_reason"] == "length" for found in answered for turn in found["turns"])


def test_a_server_that_refuses_nearly_everything_does_not_finish_a_shard(store: Path):
    """A server pinned to a model of another name said 400 to every row, and the shard was
    committed empty.
    """
    plans = ["400"]
    with answer_server(lambda body, before: plans[0], models=()) as server:
        config = server_run(store, server.url, settings=("resources.servers.max_refused=0.2",))
        run_prompts(Run(config))
        with pytest.raises(
            ShardsFailed, match=r"4 of 4 rows were refused; the first error: .*status 400"
        ):
            run_answers(Run(config), shards=[0])
        plans[0] = "answer"
        assert run_answers(Run(config), shards=[0]).records()[0].rows == 4
