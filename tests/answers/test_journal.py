"""The journal: what a killed run need not ask again."""

from collections import Counter
from pathlib import Path

import pytest

from deepspec.answers.journal import journal_path
from deepspec.artifacts.run import Run
from deepspec.errors import TransientError
from tests.answer_server import answer_server
from tests.answers.asking import ask, row, server_run


def test_a_row_that_never_gets_an_answer_fails_a_few_runs_and_then_goes_to_the_rejects(store: Path):
    """Trap A2: neither lost at the first failure nor tried for ever; the other rows are asked
    once.
    """
    with answer_server(
        lambda body, before: "500" if "poison" in body["messages"][-1]["content"] else "answer"
    ) as server:
        config = server_run(
            store,
            server.url,
            settings=("resources.servers.request_tries=2", "resources.servers.row_runs=2"),
        )
        for _ in range(2):
            with pytest.raises(TransientError, match="1 of 3 rows got no answer"):
                ask(config, row(1, "a"), row(2, "poison"), row(3, "b"), keep_journal=True)
        answered, rejects = ask(
            config, row(1, "a"), row(2, "poison"), row(3, "b"), keep_journal=True
        )
    assert [found["id"] for found in answered] == [1, 3]
    assert [found["reason"] for found in rejects] == ["failed"]
    assert Counter(body["messages"][-1]["content"] for body in server.bodies) == {
        "a": 1,
        "b": 1,
        "poison": 4,
    }


def test_a_torn_line_of_the_journal_costs_one_answer(store: Path):
    with answer_server() as server:
        config = server_run(store, server.url)
        path = journal_path(Run(config).artifact("answers"), 0)
        ask(config, row(1, "a"), row(2, "b"))
        path.write_bytes(path.read_bytes()[:-20])
        answered, _ = ask(config, row(1, "a"), row(2, "b"), keep_journal=True)
        assert (len(answered), len(server.bodies)) == (2, 3)
        ask(config, row(1, "a"), row(2, "b"), keep_journal=True)
        assert len(server.bodies) == 3
