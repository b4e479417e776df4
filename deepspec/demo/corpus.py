"""The demo's text: conversations of three domains as in the paper, *math*, *code* and *chat*.

Same seed and same Python version, same corpus. A function that a held-out prompt asks about appears
in no training conversation of either domain.
"""

import random
from typing import Literal, NamedTuple

from deepspec.config.target import DemoConfig
from deepspec.demo.library import Function, library_functions
from deepspec.demo.maths import make_problem
from deepspec.errors import DataError

Domain = Literal["math", "code", "chat"]
# Characters. Within these limits nearly every answer ends before 96 tokens; a shorter source is a
# stub.
SOURCE_LENGTH = range(30, 131)
SUMMARY_LENGTH = range(12, 101)


class DemoConversation(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    domain: Domain

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The question as messages of a chat."""
        return [{"role": "user", "content": self.question}]


class Corpus(NamedTuple):
    """What to train on, shuffled over the domains, and what to evaluate on."""

    training: list[DemoConversation]
    held_out: dict[Domain, list[DemoConversation]]


def make_corpus(config: DemoConfig) -> Corpus:
    """About `config.conversations` to train on, and `config.held_out` of each domain.

    A third per domain; if the library has too few functions for its two thirds, math has more.

    Raises:
        DataError: this Python carries too little of its library's source.
    """
    rng = random.Random(config.seed)
    functions = list(library_functions())
    rng.shuffle(functions)
    with_source = [function for function in functions if len(function.source) in SOURCE_LENGTH]
    with_summary = [function for function in functions if len(function.summary) in SUMMARY_LENGTH]
    asked_code = with_source[: config.held_out]
    other = [function for function in with_summary if function not in asked_code]
    asked_chat = other[: config.held_out]
    if min(len(asked_code), len(asked_chat)) < config.held_out:
        raise DataError(
            "too few functions with source code",
            where="standard library",
            fix="use a Python that carries its library as files",
        )
    unseen, third = {*asked_code, *asked_chat}, config.conversations // 3
    code = [about_source(function) for function in with_source if function not in unseen][:third]
    chat = [about_summary(function) for function in with_summary if function not in unseen][:third]
    math = problems(rng, config.held_out + config.conversations - len(code) - len(chat))
    training = [*math[config.held_out :], *code, *chat]
    rng.shuffle(training)
    held_out: dict[Domain, list[DemoConversation]] = {
        "math": math[: config.held_out],
        "code": [about_source(function) for function in asked_code],
        "chat": [about_summary(function) for function in asked_chat],
    }
    return Corpus(training, held_out)


def problems(rng: random.Random, number: int) -> list[DemoConversation]:
    """So many word problems, no two alike."""
    made: dict[str, DemoConversation] = {}
    while len(made) < number:
        question, answer = make_problem(rng)
        made[question] = DemoConversation(question, answer, "math")
    return list(made.values())


def about_source(function: Function) -> DemoConversation:
    """A request for a function's code."""
    question = f"Write the {function.kind} `{function.signature}` of {function.place}."
    what = f"the {function.kind} `{function.name}` of {function.place}"
    return DemoConversation(question, f"Here is {what}:\n```python\n{function.source}\n```", "code")


def about_summary(function: Function) -> DemoConversation:
    """A question for a function's documentation."""
    what = f"{function.kind} `{function.name}` of {function.place}"
    question = f"What does the {what} do?"
    answer = f"The {what} is documented as follows: {function.summary}"
    return DemoConversation(question, answer, "chat")
