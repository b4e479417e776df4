"""Training prompts that are benchmark prompts: found by their normalised text, so that they can
be dropped (trap A7).
"""

from __future__ import annotations

import re
import unicodedata

from deepspec.artifacts.run import Run
from deepspec.messages import parse_messages
from deepspec.prompts.benchmarks import read_benchmark

NOT_WORDS = re.compile(r"[\W_]+")


class BenchmarkPrompts:
    """The turns of the benchmarks in `prompts.decontaminate`, normalised.

    Of a known benchmark the bare problems are looked for as well: a training set has them without
    the benchmark's wording.

    Raises:
        DataError: a benchmark that cannot be read, or a line without turns.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        self._name_of: dict[str, str] = {}
        for name in config.prompts.decontaminate:
            for turns, problem in read_benchmark(run, name):
                self._name_of.update({normalised(text): name for text in (*turns, problem or "")})
        # a turn without a word in it would match every other such message
        self._name_of.pop("", None)

    def match(self, messages: str) -> str | None:
        """The benchmark that holds one of the users' messages of a prompt, if any does."""
        if not self._name_of:
            return None
        said = (
            normalised(message.content)
            for message in parse_messages(messages)
            if message.role == "user"
        )
        return next((self._name_of[text] for text in said if text in self._name_of), None)


def normalised(text: str) -> str:
    """The text as bare words: case, accents' encoding, punctuation and spacing make no
    difference.
    """
    return NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
