"""Word problems with worked steps, made by rule: the demo's *math* domain.

Every answer says in full what is done with which quantity before it does it, one operation a step,
and ends with the result in one fixed sentence, as the paper's math answers do: the structure is
what a draft can learn.
"""

from __future__ import annotations

import random
from collections.abc import Callable

NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Noah",
    "Olga",
    "Paul",
)
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "eggs",
    "flowers",
    "marbles",
    "nuts",
    "pears",
    "pencils",
    "shells",
    "stamps",
)
HOLDERS = ("bags", "baskets", "boxes", "crates", "jars")
SMALL = (2, 6)  # numbers that a tiny target can learn to work with

Step = tuple[str, int, str, int, int]  # what is done, then left operator right = result
Problem = tuple[str, list[Step]]


def _boxes(rng: random.Random) -> Problem:
    name, things, holders = rng.choice(NAMES), rng.choice(THINGS), rng.choice(HOLDERS)
    count, each, more = (rng.randint(*SMALL) for _ in range(3))
    question = f"{name} has {count} {holders} with {each} {things} in each. {name} gets {more} {things} more. How many {things} are there?"
    return question, [
        (
            "First we multiply how many there are in each by how many of them there are",
            count,
            "*",
            each,
            count * each,
        ),
        (
            "Then we add those that come later to this number",
            count * each,
            "+",
            more,
            count * each + more,
        ),
    ]


def _change(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    count, price, change = (rng.randint(*SMALL) for _ in range(3))
    cost = count * price
    paid = cost + change
    question = f"{name} buys {count} {things} for {price} dollars each and pays with {paid} dollars. How many dollars does {name} get back?"
    return question, [
        (
            "First we multiply the price of one by the number that is bought to find the cost",
            count,
            "*",
            price,
            cost,
        ),
        (
            "Then we subtract the cost from the money that is paid to find the change",
            paid,
            "-",
            cost,
            change,
        ),
    ]


def _together(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    first, more = rng.randint(2, 9), rng.randint(*SMALL)
    second = first + more
    question = f"{name} has {first} {things}. {other} has {more} more {things} than {name}. How many {things} do they have together?"
    return question, [
        (
            "First we add the difference to the smaller number to find the larger number",
            first,
            "+",
            more,
            second,
        ),
        (
            "Then we add the smaller number and the larger number to find the sum",
            first,
            "+",
            second,
            first + second,
        ),
    ]


def _journey(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    speed, hours, more = (rng.randint(*SMALL) for _ in range(3))
    far = speed * hours
    question = f"{name} walks {speed} km an hour for {hours} hours and then {more} km more. How many km does {name} walk?"
    return question, [
        (
            "First we multiply the speed by the time to find the length of the first part of the way",
            speed,
            "*",
            hours,
            far,
        ),
        (
            "Then we add the second part of the way to find the length of the whole way",
            far,
            "+",
            more,
            far + more,
        ),
    ]


KINDS: tuple[Callable[[random.Random], Problem], ...] = (_boxes, _change, _together, _journey)


def make_problem(rng: random.Random) -> tuple[str, str]:
    """A question and its worked answer."""
    question, steps = rng.choice(KINDS)(rng)
    lines = [
        f"Step {number}: {done}. This is {left} {sign} {right} = {result}."
        for number, (done, left, sign, right, result) in enumerate(steps, start=1)
    ]
    return question, "\n".join(
        [
            "We solve this problem step by step.",
            *lines,
            f"So the answer to the question is {steps[-1][-1]}.",
        ]
    )
