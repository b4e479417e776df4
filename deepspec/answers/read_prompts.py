"""What a target read as its prompt: compared with what its own tokenizer and template give, and
kept where it is not what the row as stored would be rendered to.

Training uses what the target read, so a server with another template is no silent difference
between answers and hidden states; a share of rows above a limit is a server set up wrongly.
"""

from collections.abc import Sequence
from itertools import zip_longest

from deepspec.errors import DataError
from deepspec.messages import in_stored_order
from deepspec.target.chat import Chat
from deepspec.target.conversation import AnswerRequest, Turn


def ids_to_keep(
    chat: Chat, request: AnswerRequest, read: list[int], *, rendered: list[int]
) -> list[int] | None:
    """The prompt that the target read, or None where rendering the stored row gives the same.

    `rendered` is what rendering the request gives, whose tools have their keys in another order.
    """
    if request.tools:
        rendered = chat.render(request.messages, in_stored_order(request.tools))
    return None if read == rendered else read


def difference(chat: Chat, expected: Sequence[int], turn: Turn) -> str | None:
    """How the prompt that a server read differs from the ids `expected`; None where it does not.

    A server that gives no ids is compared by their number, and one that counts none, not at all.
    """
    found = turn.prompt_token_ids
    if found is None:
        if turn.num_prompt_tokens in (0, len(expected)):
            return None
        return f"{turn.endpoint} counts {turn.num_prompt_tokens} tokens instead of {len(expected)}"
    for position, (theirs, ours) in enumerate(zip_longest(found, expected)):
        if theirs != ours:
            texts = f"{_text(chat, theirs)} instead of {_text(chat, ours)}"
            return f"{turn.endpoint} reads {texts} at position {position}"
    return None


def _text(chat: Chat, token: int | None) -> str:
    return "nothing" if token is None else f"{chat.tokenizer.decode([token])!r} ({token})"


class DifferingPrompts:
    """The rows of one shard of which a server read a prompt that is not as expected."""

    def __init__(self, *, num_rows: int, max_share: float) -> None:
        self._num_rows = num_rows
        self._max_share = max_share
        self._rows = set[int]()
        self._first = ""

    def add(self, row: int, how: str) -> None:
        """Count the row.

        Raises:
            DataError: as soon as there are more than the share; what differs first is in it.
        """
        self._rows.add(row)
        self._first = self._first or how
        if len(self._rows) > self._max_share * self._num_rows:
            raise DataError(
                f"prompts reach the target as other tokens than its tokenizer and template give,"
                f" {len(self._rows)} of {self._num_rows} so far; the first: {self._first}",
                where="answers",
                fix="serve the target with its own tokenizer and chat template, or raise"
                " resources.servers.max_differing_prompts: training uses what servers report",
            )
