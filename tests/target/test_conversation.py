"""The conversation of a row with an engine."""

from deepspec.messages import Message
from deepspec.target.conversation import conversation_so_far, stream_seed


def row(number: int, *messages: str) -> dict:
    import json

    text = json.dumps([{"role": "user", "content": message} for message in messages])
    return {"id": number, "held_out": False, "domain": None, "messages": text}


def test_streams_differ_by_row_turn_and_seed():
    assert (
        len({stream_seed(seed, row, turn) for seed in (1, 2) for row in (1, 2) for turn in (0, 1)})
        == 8
    )


def test_the_conversation_ends_at_the_first_unanswered_user_message():
    messages = [Message("user", "a"), Message("user", "b")]
    assert [message.content for message in conversation_so_far(messages, []) or []] == ["a"]
    assert [message.content for message in conversation_so_far(messages, ["x"]) or []] == [
        "a",
        "x",
        "b",
    ]
    assert conversation_so_far(messages, ["x", "y"]) is None
