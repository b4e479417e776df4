"""What servers are sent."""

import json
from pathlib import Path

import pytest

from tests.answer_server import answer_server
from tests.answers.asking import ask, row, server_run


@pytest.mark.parametrize(
    ("setting", "sent"),
    [
        ("answers.sampling.temperature=0.3", {"temperature": 0.3}),
        ("answers.sampling.top_p=0.8", {"top_p": 0.8}),
        ("answers.sampling.top_k=20", {"top_k": 20}),
        ("answers.sampling.min_p=0.1", {"min_p": 0.1}),
        ("answers.sampling.repetition_penalty=1.2", {"repetition_penalty": 1.2}),
        ("answers.sampling.presence_penalty=0.5", {"presence_penalty": 0.5}),
        ("answers.max_new_tokens=7", {"max_tokens": 7}),
        ("target.thinking=true", {"chat_template_kwargs": {"enable_thinking": True}}),
        ("resources.servers.token_ids=ask", {"return_token_ids": True}),
        ("resources.servers.model_name=other", {"model": "other"}),
    ],
)
def test_every_parameter_is_sent_under_its_own_name_and_alone(
    store: Path, setting: str, sent: dict
):
    """Trap A4: against the body without the setting, this one field differs and no other."""
    with answer_server(models=()) as server:
        for settings in ((), (setting,)):
            ask(server_run(store, server.url, settings=settings), row(1, "hello"))
    plain, changed = server.bodies
    assert {key: value for key, value in changed.items() if plain.get(key) != value} == sent


@pytest.mark.parametrize("dialect", ["vllm", "sglang", "transformers", "openai"])
def test_to_a_server_that_is_known_everything_is_said(store: Path, dialect: str):
    """What is left out vLLM, SGLang and transformers take from the model's
    generation_config.json: top_k 20 where 0 was asked for.
    """
    with answer_server() as server:
        server.owner = dialect if dialect in ("vllm", "sglang") else "somebody"
        settings = ("resources.servers.dialect=transformers",) if dialect == "transformers" else ()
        ask(server_run(store, server.url, settings=settings), row(1, "a"))
    body = server.bodies[0]
    if dialect == "transformers":
        body = json.loads(body["generation_config"]) | {
            key: value for key, value in body.items() if key != "generation_config"
        }
        assert body["do_sample"] is True
    assert body.get("return_token_ids", False) == (dialect in ("vllm", "sglang"))
    expected = {"openai": {}, "transformers": {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}}
    known = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
    fields = ("top_k", "min_p", "repetition_penalty", "skip_special_tokens")
    assert {key: body[key] for key in fields if key in body} == expected.get(dialect, known)


def test_the_seed_is_the_rows_own(store: Path):
    with answer_server() as server:
        ask(server_run(store, server.url), row(1, "a"), row(2, "b"))
    assert len({body["seed"] for body in server.bodies}) == 2


@pytest.mark.parametrize(
    ("owner", "settings", "choice"),
    [
        ("vllm", (), "none"),  # refuses all tools without, unless it has a parser of their calls
        ("somebody", (), "none"),
        ("sglang", (), None),  # "none" takes the tools out of its prompt
        ("x", ("resources.servers.dialect=transformers",), None),  # refuses the field
    ],
)
def test_tools_and_their_results_reach_the_server(
    store: Path, owner: str, settings: tuple[str, ...], choice: str | None
):
    """As rows store them, with sorted keys; as targets know them, in the order of the schema."""
    about = {"description": "adds", "name": "add", "parameters": {"name": {}, "kind": {}}}
    tools = [{"function": {**about, "x": 1}, "type": "function"}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "user", "content": "thanks"},
    ]
    with answer_server() as server:
        server.owner = owner
        answered, _ = ask(
            server_run(store, server.url, settings=settings),
            {**row(1), "messages": json.dumps(messages), "tools": json.dumps(tools)},
        )
    assert [turn["text"] for turn in answered[0]["turns"]] == ["2", "sknaht"]
    assert server.bodies[0]["tools"] == tools
    (tool,) = server.bodies[0]["tools"]
    assert [*tool, *tool["function"]] == [
        *("type", "function", "name", "description", "parameters", "x")
    ]
    assert list(tool["function"]["parameters"]) == ["name", "kind"]
    assert server.bodies[0].get("tool_choice") == choice
    assert [message["role"] for message in server.bodies[0]["messages"]] == [
        "user",
        "assistant",
        "tool",
    ]
    assert server.bodies[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
