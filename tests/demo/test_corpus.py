"""The corpus: the same again from the same seed, and nothing held out is ever trained on."""

import random
import re
from collections import Counter
from typing import get_args

import pytest

from deepspec.config.target import DemoConfig
from deepspec.demo import corpus as corpus_module
from deepspec.demo.corpus import Corpus, Domain, make_corpus
from deepspec.demo.maths import KINDS, make_problem
from deepspec.errors import DataError

DOMAINS = get_args(Domain)
CONFIG = DemoConfig(conversations=900, held_out=10)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(CONFIG)


def test_the_same_seed_makes_the_same_corpus_another_seed_another(corpus: Corpus):
    assert make_corpus(CONFIG) == corpus
    assert make_corpus(CONFIG.model_copy(update={"seed": 1})) != corpus


def test_every_domain_has_its_third_and_its_held_out_prompts(corpus: Corpus):
    assert Counter(row.domain for row in corpus.training) == dict.fromkeys(DOMAINS, 300)
    assert {domain: len(rows) for domain, rows in corpus.held_out.items()} == dict.fromkeys(
        DOMAINS, 10
    )


def test_the_domains_are_mixed_from_the_first_prompts_on(corpus: Corpus):
    assert min(Counter(row.domain for row in corpus.training[:60]).values()) > 10


def test_no_held_out_question_or_function_is_trained_on(corpus: Corpus):
    held_out = [row for rows in corpus.held_out.values() for row in rows]
    questions = {row.question for row in corpus.training}
    assert len(questions) == len(corpus.training), "no question twice"
    assert questions.isdisjoint(row.question for row in held_out)
    trained = "\n".join(row.question + row.answer for row in corpus.training)
    for row in [*corpus.held_out["code"], *corpus.held_out["chat"]]:
        name = re.search(r"`(\w+)", row.question)
        place = row.question.partition(" of ")[2].rstrip(". ").removesuffix(" do?")
        assert name and place
        assert f"`{name[1]}` of {place}" not in trained


def test_a_library_without_source_files_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus_module, "library_functions", lambda: ())
    with pytest.raises(DataError, match="too few functions"):
        make_corpus(CONFIG)


def test_every_step_of_a_worked_answer_is_right():
    rng = random.Random(0)
    for _ in range(50 * len(KINDS)):
        question, answer = make_problem(rng)
        steps = re.findall(r"(\d+) ([*+-]) (\d+) = (\d+)", answer)
        results = {"*": lambda a, b: a * b, "+": lambda a, b: a + b, "-": lambda a, b: a - b}
        assert all(
            results[sign](int(left), int(right)) == int(result)
            for left, sign, right, result in steps
        )
        assert len(steps) == answer.count("Step ")
        assert answer.endswith(f" {steps[-1][3]}.")
        known = {*re.findall(r"\d+", question), *(result for *_, result in steps)}
        assert all({left, right} <= known for left, _, right, _ in steps), (
            "a step uses only what is given or worked out"
        )
