"""Training prompts that are benchmark prompts: found by their normalised text, so that they can be dropped (trap A7)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from deepspec.data.chat import parse_messages
from deepspec.data.sources import read_file
from deepspec.errors import DataError

NOT_WORDS = re.compile(r"[\W_]+")


class BenchmarkPrompts:
    """The turns of benchmark files (`{"turns": [...]}` a line), normalised.

    Raises:
        DataError: a file that cannot be read, or a line without turns.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._file_of: dict[str, str] = {}
        for file in files:
            for number, row in enumerate(read_file(file), start=1):
                turns = row.get("turns")
                if not isinstance(turns, Sequence) or isinstance(turns, str):
                    raise DataError("the row has no turns", where=f"{file}, row {number}", fix="see prompts.decontaminate")
                self._file_of.update({normalised(str(turn)): file for turn in turns})
        self._file_of.pop("", None)  # a turn without a word in it would match every other such message

    def match(self, messages: str) -> str | None:
        """The file that holds one of the users' messages of a prompt, if any does."""
        if not self._file_of:
            return None
        said = (normalised(message.content) for message in parse_messages(messages) if message.role == "user")
        return next((self._file_of[text] for text in said if text in self._file_of), None)


def normalised(text: str) -> str:
    """The text as bare words: case, accents' encoding, punctuation and spacing make no difference."""
    return NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
