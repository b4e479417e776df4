"""Word problems with worked steps, made by rule: the demo's *math* domain.

Every answer restates the numbers of its question, works in numbered steps of one operation and ends with the answer in
one fixed sentence, as the paper's math answers do: the structure is what a draft can learn.
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
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "nuts", "pears", "pencils", "shells", "stamps")
HOLDERS = ("bags", "baskets", "boxes", "crates", "jars")
VEHICLES = ("bus", "car", "ship", "train", "truck")

Problem = tuple[str, list[str], str]  # question, steps, the answer with its unit


def _boxes(rng: random.Random) -> Problem:
    name, things, holders = rng.choice(NAMES), rng.choice(THINGS), rng.choice(HOLDERS)
    count, each = rng.randint(2, 9), rng.randint(3, 12)
    total, given = count * each, rng.randint(1, count * each - 1)
    question = f"{name} has {count} {holders} with {each} {things} in each. {name} gives away {given} {things}. How many {things} are left?"
    steps = [
        f"{count} {holders} with {each} {things} in each hold {count} * {each} = {total} {things}.",
        f"{name} gives away {given} {things}, so {total} - {given} = {total - given} {things} are left.",
    ]
    return question, steps, f"{total - given} {things}"


def _change(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    cost = count * price
    paid = cost + rng.randint(1, 20)
    question = f"{name} buys {count} {things} for {price} dollars each and pays with {paid} dollars. How many dollars does {name} get back?"
    steps = [
        f"{count} {things} for {price} dollars each cost {count} * {price} = {cost} dollars.",
        f"{name} pays with {paid} dollars, so {name} gets back {paid} - {cost} = {paid - cost} dollars.",
    ]
    return question, steps, f"{paid - cost} dollars"


def _together(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    first, more = rng.randint(3, 30), rng.randint(2, 20)
    second = first + more
    question = f"{name} has {first} {things}. {other} has {more} more {things} than {name}. How many {things} do they have together?"
    steps = [
        f"{other} has {more} more {things} than {name}, so {other} has {first} + {more} = {second} {things}.",
        f"Together they have {first} + {second} = {first + second} {things}.",
    ]
    return question, steps, f"{first + second} {things}"


def _shared(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    friends, share, kept = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 9)
    total = friends * share + kept
    question = (
        f"{name} has {total} {things}. {name} keeps {kept} {things} and shares the rest among {friends} friends. "
        f"How many {things} does each friend get?"
    )
    steps = [
        f"{name} keeps {kept} {things}, so the rest is {total} - {kept} = {total - kept} {things}.",
        f"The rest is shared among {friends} friends, so each friend gets {total - kept} / {friends} = {share} {things}.",
    ]
    return question, steps, f"{share} {things}"


def _journey(rng: random.Random) -> Problem:
    vehicle = rng.choice(VEHICLES)
    speed, hours, more = 10 * rng.randint(2, 9), rng.randint(2, 9), 10 * rng.randint(1, 9)
    far = speed * hours
    question = f"A {vehicle} travels {speed} km an hour for {hours} hours and then {more} km more. How many km does the {vehicle} travel?"
    steps = [
        f"In {hours} hours the {vehicle} travels {speed} * {hours} = {far} km.",
        f"With {more} km more the {vehicle} travels {far} + {more} = {far + more} km.",
    ]
    return question, steps, f"{far + more} km"


def _savings(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    start, weeks, rate = rng.randint(2, 30), rng.randint(2, 9), rng.randint(2, 9)
    added = weeks * rate
    question = (
        f"{name} has {start} dollars and saves {rate} dollars a week for {weeks} weeks to buy {things}. "
        f"How many dollars does {name} have then?"
    )
    steps = [
        f"In {weeks} weeks {name} saves {rate} * {weeks} = {added} dollars.",
        f"{name} has {start} dollars, so {name} has {start} + {added} = {start + added} dollars then.",
    ]
    return question, steps, f"{start + added} dollars"


KINDS: tuple[Callable[[random.Random], Problem], ...] = (_boxes, _change, _together, _shared, _journey, _savings)


def make_problem(rng: random.Random) -> tuple[str, str]:
    """A question and its worked answer."""
    question, steps, answer = rng.choice(KINDS)(rng)
    lines = [f"Step {number}: {step}" for number, step in enumerate(steps, start=1)]
    return question, "\n".join([*lines, f"The answer is {answer}."])
