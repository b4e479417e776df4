"""Connections to servers: models, keys and proxies."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepspec.artifacts.run import Run
from deepspec.errors import ConfigError
from deepspec.prompts.stage import run_prompts
from tests.answer_server import answer_server
from tests.answers.asking import ask, connect, row, server_run


def test_a_proxy_is_not_asked_for_a_server_on_this_machine(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with answer_server() as server:
        assert len(ask(server_run(store, server.url), row(1, "abc"))[0]) == 1


def test_a_server_of_another_model_is_refused_before_the_first_prompt(store: Path):
    with (
        answer_server(models=("somebody-else",)) as server,
        pytest.raises(ConfigError, match="serves somebody-else, not demo"),
    ):
        connect(server_run(store, server.url)).__enter__()
    assert server.bodies == []


def test_a_refused_key_is_one_clear_error_and_is_nowhere_in_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
):
    with answer_server(key="right") as server:
        with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
            monkeypatch.delenv("OPENAI_API_KEY", raising=False)
            connect(server_run(store, server.url)).__enter__()
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        with pytest.raises(ConfigError, match="OPENAI_API_KEY is refused") as caught:
            connect(server_run(store, server.url)).__enter__()
    assert "sk-secret" not in str(caught.value)


def test_the_key_is_in_nothing_that_a_run_leaves_behind(store: Path, tmp_path: Path):
    """Records, rejects, failures, journal, events and logs, of servers that take the key and of
    one that repeats it.
    """
    key, plans = "sk-secret-of-a-user", itertools.cycle(["answer", "answer", "400", "500"])
    with (
        answer_server(lambda body, before: next(plans), key=key) as server,
        answer_server(key="another") as refusing,
    ):
        said = []
        for url, shards in ((server.url, "0-2"), (refusing.url, "3-5")):
            config = server_run(store, url, settings=("resources.servers.request_tries=3",))
            run_prompts(Run(config))
            (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
            env = {
                **os.environ,
                "OPENAI_API_KEY": key,
                "DEEPSPEC_EVENTS": "1",
                "DEEPSPEC_LOG": "DEBUG",
            }
            command = [
                sys.executable,
                "-m",
                "deepspec",
                "answers",
                str(tmp_path / "run.yaml"),
                "--shards",
                shards,
            ]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            said.append(done.stdout + done.stderr)
    assert "OPENAI_API_KEY is refused" in said[1]
    left = [path for path in store.rglob("*") if path.is_file()]
    assert any("journal" in path.parts or "records" in path.parts for path in left)
    assert [path for path in left if key.encode() in path.read_bytes()] == []
    assert [words for words in said if key in words] == []


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host/v1", "http://user:word@host/v1", "http://host/v1?key=x"]
)
def test_an_endpoint_that_is_none_or_holds_a_key_is_refused(store: Path, url: str):
    with pytest.raises(ConfigError, match=r"resources\.servers\.endpoints"):
        server_run(store, url)
