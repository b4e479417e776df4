"""The events that a stage of answers publishes."""

import json
from pathlib import Path

from deepspec.answers.stage import run_answers
from deepspec.artifacts.run import Run
from deepspec.prompts.stage import run_prompts
from tests.answer_server import answer_server
from tests.answers.asking import server_run


def test_progress_within_a_shard_is_told_while_it_goes_on(store: Path):
    events = []
    with answer_server(latency_s=0.2) as server:
        config = server_run(
            store,
            server.url,
            settings=("resources.servers.progress_s=0.01", "resources.servers.requests=2"),
        )
        run_prompts(Run(config))
        run_answers(Run(config), report=events.append)
    told = [event for event in events if event["event"] == "answering"]
    assert any(
        0 < event["rows"] < 4 and event["in_flight"] == 2 and event["left_s"] is not None
        for event in told
    )
    assert (told[-1]["rows"], told[-1]["rows_todo"], told[-1]["tokens"], told[-1]["in_flight"]) == (
        24,
        24,
        120,
        0,
    )
    assert len(json.dumps(told[-1])) < 300
