"""Replies of servers as answers of the target."""

from pathlib import Path

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


def test_thinking_that_the_server_took_apart_is_put_together_as_the_target_wrote_it(tmp_path: Path):
    """Trap A5."""
    with answer_server(always("reason")) as server:
        answered, _ = ask(server_run(tmp_path, server.url), row(1, "abc"))
    assert answered[0]["turns"][0]["text"] == "<think>\nhm\n</think>\n\ncba"


def test_a_thought_that_the_limit_cut_off_gets_no_end_that_the_target_never_wrote(tmp_path: Path):
    with answer_server(always("cut thought")) as server:
        answered, _ = ask(server_run(tmp_path, server.url), row(1, "abc"))
    assert answered[0]["turns"][0]["text"] == "<think>\nhm, so"


def test_a_server_that_counts_no_tokens_is_taken_at_its_word(tmp_path: Path):
    with answer_server(always("no counts")) as server:
        answered, _ = ask(server_run(tmp_path, server.url), row(1, "abc"))
    assert answered[0]["turns"][0]["num_tokens"] == 0
