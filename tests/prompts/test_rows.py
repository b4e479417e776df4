"""One row of a source as a prompt, or the reason why it is none."""

import json

import pytest

from deepspec.config.data import PromptsConfig
from deepspec.prompts.rows import Prompt, Rejected, make_prompt

SETTINGS = PromptsConfig.model_validate({"source": {"kind": "demo"}, "held_out": 0.5})


def test_assistant_turns_are_dropped_and_the_rest_is_kept():
    row = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
        ]
    }
    prompt = make_prompt(row, SETTINGS)
    assert isinstance(prompt, Prompt)
    assert json.loads(prompt.messages) == [
        {"content": "s", "role": "system"},
        {"content": "u", "role": "user"},
    ]


def test_the_same_conversation_has_the_same_id_in_every_shape():
    shapes = [
        {"prompt": "hello"},
        {"turns": ["hello"]},
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "hi"},
            ]
        },
        {"conversations": [{"from": "human", "value": "hello"}]},
    ]
    assert len({make_prompt(row, SETTINGS) for row in shapes}) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "no_messages"),
        ({"messages": []}, "no_messages"),
        ({"messages": "hello"}, "no_messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown_role"),
        ({"messages": ["hello"]}, "unknown_role"),
        ({"turns": "abc"}, "no_messages"),
        ({"prompt": "half a pair: \ud83d"}, "bad_text"),
        ({"prompt": "x", "tools": [{"name": "\ud83d"}]}, "bad_tools"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown_role"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty_message"),
        ({"messages": [{"role": "user", "content": None}]}, "empty_message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "roles_out_of_order"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]},
            "roles_out_of_order",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "system_not_first",
        ),
    ],
)
def test_each_kind_of_bad_row_is_rejected_with_its_reason(row: dict, reason: str):
    outcome = make_prompt(row, SETTINGS)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == reason


def test_calls_of_tools_and_their_results_are_kept_and_other_answers_are_not():
    call = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "thanks"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    made = [
        make_prompt({"messages": messages, "tools": given}, SETTINGS)
        for given in (tools, json.dumps(tools))
    ]
    assert made[0] == made[1]
    assert isinstance(made[0], Prompt)
    assert json.loads(made[0].tools or "") == tools
    assert [message["role"] for message in json.loads(made[0].messages)] == [
        "user",
        "assistant",
        "tool",
        "user",
    ]
    bare = make_prompt({"messages": messages}, SETTINGS)
    assert isinstance(bare, Prompt)
    assert bare.id != made[0].id


@pytest.mark.parametrize("tools", ["{", "3", [1], {"a": 1}])
def test_tools_that_are_none_are_rejected(tools: object):
    outcome = make_prompt({"prompt": "x", "tools": tools}, SETTINGS)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "bad_tools"


@pytest.mark.parametrize(
    "also", [{"prompt": "one"}, {"prompt": "one", "turns": []}, {"conversations": None}]
)
def test_a_row_with_several_columns_keeps_its_whole_conversation(also: dict):
    said = [("user", "one"), ("assistant", "1"), ("user", "two")]
    prompt = make_prompt(
        {"messages": [{"role": role, "content": text} for role, text in said], **also}, SETTINGS
    )
    assert isinstance(prompt, Prompt)
    assert [message["content"] for message in json.loads(prompt.messages)] == ["one", "two"]
