"""The demo's text: conversations of three domains as in the paper, *math*, *code* and *chat*.

Same seed and same Python version, same corpus. A function that a held-out prompt asks about appears
in no training conversation of either domain.
"""

from __future__ import annotations

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


class Conversation(NamedTuple):
    question: str
    answer: str
    domain: Domain

    @property
    def messages(self) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]


class Corpus(NamedTuple):
    training: list[Conversation]  # shuffled over the domains
    held_out: dict[Domain, list[Conversation]]


def make_corpus(config: DemoConfig) -> Corpus:
    """About `config.conversations` to train on, a third per domain, and `config.held_out` of each
    domain apart from them.

    Where the library has too few functions for its two thirds, math makes up for them.

    Raises:
        DataError: this Python carries too little of its library's source.
    """
    rng = random.Random(config.seed)
    functions = list(library_functions())
    rng.shuffle(functions)
    with_source = [function for function in functions if len(function.source) in SOURCE_LENGTH]
    with_summary = [function for function in functions if len(function.summary) in SUMMARY_LENGTH]
    asked_code = with_source[: config.held_out]
    asked_chat = [function for function in with_summary if function not in asked_code][
        : config.held_out
    ]
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
    held_out: dict[Domain, list[Conversation]] = {
        "math": math[: config.held_out],
        "code": [about_source(function) for function in asked_code],
        "chat": [about_summary(function) for function in asked_chat],
    }
    return Corpus(training, held_out)


def problems(rng: random.Random, number: int) -> list[Conversation]:
    """So many word problems, no two alike."""
    made: dict[str, Conversation] = {}
    while len(made) < number:
        question, answer = make_problem(rng)
        made[question] = Conversation(question, answer, "math")
    return list(made.values())


def about_source(function: Function) -> Conversation:
    question = f"Write the {function.kind} `{function.signature}` of {function.place}."
    answer = f"Here is the {function.kind} `{function.name}` of {function.place}:\n```python\n{function.source}\n```"
    return Conversation(question, answer, "code")


def about_summary(function: Function) -> Conversation:
    question = f"What does the {function.kind} `{function.name}` of {function.place} do?"
    answer = f"The {function.kind} `{function.name}` of {function.place} is documented as follows: {function.summary}"
    return Conversation(question, answer, "chat")
