"""Replies of servers as answers of the target."""

from pathlib import Path

import pytest
from openai.types.chat import ChatCompletion

from deepspec.answers.response import read_reply
from deepspec.messages import Message
from deepspec.target.chat import CHAT_FAMILIES
from deepspec.target.conversation import AnswerRequest, Refused, Turn
from tests.answer_server import always, answer_server
from tests.answers.asking import ask, row, server_run


def test_gemma4s_thinking_comes_back_as_it_was_written_or_not_at_all():
    gemma4 = CHAT_FAMILIES["gemma4"]
    message = {"role": "assistant", "content": "cba", "reasoning": "hm"}
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    request = AnswerRequest(1, [Message("user", "abc")], 7, 12)
    turn = read_reply(ChatCompletion.model_validate(reply), request, gemma4, endpoint="http://x/v1")
    assert isinstance(turn, Turn) and turn.text == "<|channel>thought\nhm\n<channel|>cba"
    # special tokens left out: nobody knows where it ended
    message |= {"content": "thought\nhmcba", "reasoning": None}
    assert isinstance(
        read_reply(ChatCompletion.model_validate(reply), request, gemma4, endpoint="http://x/v1"),
        Refused,
    )


def test_thinking_that_the_server_took_apart_is_put_together_as_the_target_wrote_it(store: Path):
    """Trap A5."""
    with answer_server(always("reason")) as server:
        answered, _ = ask(server_run(store, server.url), row(1, "abc"))
    assert answered[0]["turns"][0]["text"] == "<think>\nhm\n</think>\n\ncba"


def test_a_thought_that_the_limit_cut_off_gets_no_end_that_the_target_never_wrote(store: Path):
    with answer_server(always("cut thought")) as server:
        answered, _ = ask(server_run(store, server.url), row(1, "abc"))
    assert answered[0]["turns"][0]["text"] == "<think>\nhm, so"


def test_a_server_that_counts_no_tokens_is_taken_at_its_word(store: Path):
    with answer_server(always("no counts")) as server:
        answered, _ = ask(server_run(store, server.url), row(1, "abc"))
    assert answered[0]["turns"][0]["num_tokens"] == 0


@pytest.mark.parametrize(
    ("of_reply", "of_choice"),
    [
        ({"prompt_token_ids": [1, 2]}, {"token_ids": [3, 4]}),  # vLLM
        ({}, {"prompt_token_ids": [1, 2], "response_token_ids": [3, 4]}),  # SGLang
        ({}, {}),
    ],
)
def test_the_ids_of_prompt_and_answer_are_read_under_the_names_of_either_engine(
    of_reply: dict, of_choice: dict
):
    turn = turn_of(of_reply, of_choice)
    assert turn.prompt_token_ids == ([1, 2] if of_choice else None)
    assert turn.token_ids == ([3, 4] if of_choice else None)


@pytest.mark.parametrize("ids", ["12", [1, "2"], {"a": 1}])
def test_ids_that_are_none_are_no_answer(ids: object):
    with pytest.raises(ValueError, match="no integers"):
        turn_of({"prompt_token_ids": ids}, {})


def turn_of(of_reply: dict, of_choice: dict) -> Turn:
    message = {"role": "assistant", "content": "cba"}
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **of_choice}],
        **of_reply,
    }
    request = AnswerRequest(1, [Message("user", "abc")], 7, 12)
    found = ChatCompletion.model_validate(reply)
    turn = read_reply(found, request, CHAT_FAMILIES["qwen"], endpoint="http://x/v1")
    assert isinstance(turn, Turn)
    return turn
