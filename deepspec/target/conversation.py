"""A conversation with an engine: one answer at a time, each on what was answered before.

An engine is given an `AnswerRequest` and gives back a `Turn`, `Refused` or `Failed`; how is its own
affair.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepspec.config.data import AnswersConfig
from deepspec.messages import Message, in_api_order, parse_messages, parse_tools

# Where nothing else is set, a second try of a truncated answer gets so many times the tokens.
MORE_ROOM = 4
FAILED = "failed"  # the reason of a row that got no answer in any run


class AnswerRequest(NamedTuple):
    """One answer to make, of one row."""

    id: int  # of the row
    messages: list[Message]  # up to the one that is answered
    seed: int  # of this answer's random stream
    max_new_tokens: int
    tools: list[dict[str, Any]] | None = None


class Turn(NamedTuple):
    """One answer, as it is stored."""

    text: str
    token_ids: list[int] | None
    finish_reason: str
    num_tokens: int
    num_prompt_tokens: int
    seed: int
    endpoint: str | None = None
    served_model: str | None = None
    prompt_token_ids: list[int] | None = None
    """What the target read, where that is not what its template gives for the row as stored."""


class Refused(NamedTuple):
    """A request will never be answered: its row goes to the rejects with this reason."""

    reason: str
    detail: str


class Failed(NamedTuple):
    """All attempts at a request failed; its row is tried again in a later run."""

    detail: str


Outcome = Turn | Refused | Failed


class Conversation:
    """A row and the answers that it waits for.

    `next_request` and `receive` are called in turn, until there is no request any more.
    """

    def __init__(self, row: Mapping[str, Any], settings: AnswersConfig) -> None:
        self.row = row
        self.turns: list[Turn] = []
        self.ended: Refused | Failed | None = None
        self._messages = parse_messages(row["messages"])
        self._tools = in_api_order(parse_tools(row.get("tools")))
        self._settings = settings
        self._limit = settings.max_new_tokens

    def next_request(self) -> AnswerRequest | None:
        """The answer to make now; None when all are made, or none will be."""
        if self.ended is not None:
            return None
        messages = conversation_so_far(self._messages, [turn.text for turn in self.turns])
        if messages is None:
            return None
        row = self.row["id"]
        seed = stream_seed(self._settings.seed, row, len(self.turns))
        return AnswerRequest(row, messages, seed, self._limit, self._tools)

    def receive(self, outcome: Outcome, *, limit: int | None = None) -> None:
        """Take the outcome of the request made last.

        `limit` is what the context left of the tokens that were asked for, where that was less.
        """
        if not isinstance(outcome, Turn):
            self.ended = outcome
            return
        settings = self._settings
        larger = settings.retry_max_new_tokens or MORE_ROOM * settings.max_new_tokens
        truncated = outcome.finish_reason == "length"
        has_more = limit is None and self._limit < larger
        if truncated and settings.truncated == "retry" and has_more:
            self._limit = larger
        elif truncated and settings.truncated == "drop":
            reached = limit or self._limit
            why = f"the answer of turn {len(self.turns)} reached its limit of {reached} tokens"
            self.ended = Refused("truncated", why)
        else:
            self.turns.append(outcome)
            self._limit = settings.max_new_tokens


def conversation_so_far(
    messages: Sequence[Message], answers: Sequence[str]
) -> list[Message] | None:
    """The messages up to the first one without an answer, with the answers before it inserted.

    An answer follows a user's message or a tool's result, unless the source's own call of a tool
    comes next.

    Returns:
        None when all are answered.
    """
    conversation = []
    remaining = iter(answers)
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        conversation.append(message)
        if message.role in ("user", "tool") and (following is None or following.role == "user"):
            answer = next(remaining, None)
            if answer is None:
                return conversation
            conversation.append(Message("assistant", answer))
    return None


def stream_seed(seed: int, row: int, turn: int) -> int:
    """The seed (63 bits) of one answer's random stream, which belongs to the row, not its batch.

    Training takes a sample's random choices of an epoch from (seed, epoch, sample id) alike.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}:{turn}".encode()).digest()[:8], "big") >> 1
