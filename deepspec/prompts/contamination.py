"""Training prompts that are benchmark prompts, found by their normalised text (trap A7)."""

import re
import unicodedata

from deepspec.artifacts.run import Run
from deepspec.messages import parse_messages
from deepspec.prompts.benchmarks import read_benchmark

NOT_WORDS = re.compile(r"[\W_]+")


class BenchmarkTexts:
    """The turns of the benchmarks in `prompts.decontaminate`, normalised.

    Of a known benchmark also the bare problems, as a training set may have them without the
    benchmark's wording.
    """

    def __init__(self, run: Run) -> None:
        """Read the benchmarks.

        Raises:
            DataError: a benchmark cannot be read, or has a line without turns.
        """
        self._benchmark_of: dict[str, str] = {}
        for name in run.config.prompts.decontaminate:
            for turns, problem in read_benchmark(run, name):
                for text in (*turns, problem or ""):
                    self._benchmark_of[normalised(text)] = name
        # a turn without a word in it would match every other such message
        self._benchmark_of.pop("", None)

    def match(self, messages: str) -> str | None:
        """The benchmark, if any, that contains one of the user's messages (JSON) of a prompt."""
        if not self._benchmark_of:
            return None
        for message in parse_messages(messages):
            if message.role == "user":
                benchmark = self._benchmark_of.get(normalised(message.content))
                if benchmark is not None:
                    return benchmark
        return None


def normalised(text: str) -> str:
    """The text as bare words, without case, punctuation, spacing and encoding of accents."""
    return NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
