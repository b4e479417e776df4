"""Word problems with worked steps, made by rule: the demo's *math* domain.

Every answer states what is done with which quantity before it does it, one operation a step,
and ends with the result in one fixed sentence, as the paper's math answers do: the structure is
what a draft can learn.
"""

import operator
import random

NAMES = [
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
]
THINGS = [
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
]
HOLDERS = ("bags", "baskets", "boxes", "crates", "jars")
SMALL = (2, 6)  # numbers that a tiny target can learn to work with
OPERATORS = {"*": operator.mul, "+": operator.add, "-": operator.sub}

Step = tuple[str, int, str, int]  # what is done, then left operator right
Problem = tuple[str, list[Step]]


def _boxes(rng: random.Random) -> Problem:
    name, things, holders = rng.choice(NAMES), rng.choice(THINGS), rng.choice(HOLDERS)
    count, each, more = (rng.randint(*SMALL) for _ in range(3))
    question = (
        f"{name} has {count} {holders} with {each} {things} in each. "
        f"{name} gets {more} {things} more. How many {things} are there?"
    )
    multiply = "First we multiply how many there are in each by how many of them there are"
    add = "Then we add those that come later to this number"
    return question, [(multiply, count, "*", each), (add, count * each, "+", more)]


def _change(rng: random.Random) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    count, price, change = (rng.randint(*SMALL) for _ in range(3))
    cost = count * price
    paid = cost + change
    question = (
        f"{name} buys {count} {things} for {price} dollars each and pays with {paid} dollars. "
        f"How many dollars does {name} get back?"
    )
    multiply = "First we multiply the price of one by the number that is bought to find the cost"
    subtract = "Then we subtract the cost from the money that is paid to find the change"
    return question, [(multiply, count, "*", price), (subtract, paid, "-", cost)]


def _together(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    first, more = rng.randint(2, 9), rng.randint(*SMALL)
    question = (
        f"{name} has {first} {things}. {other} has {more} more {things} than {name}. "
        f"How many {things} do they have together?"
    )
    larger = "First we add the difference to the smaller number to find the larger number"
    total = "Then we add the smaller number and the larger number to find the sum"
    return question, [(larger, first, "+", more), (total, first, "+", first + more)]


def _journey(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    speed, hours, more = (rng.randint(*SMALL) for _ in range(3))
    question = (
        f"{name} walks {speed} km an hour for {hours} hours and then {more} km more. "
        f"How many km does {name} walk?"
    )
    multiply = (
        "First we multiply the speed by the time to find the length of the first part of the way"
    )
    add = "Then we add the second part of the way to find the length of the whole way"
    return question, [(multiply, speed, "*", hours), (add, speed * hours, "+", more)]


KINDS = (_boxes, _change, _together, _journey)


def make_problem(rng: random.Random) -> tuple[str, str]:
    """A question and its worked answer."""
    question, steps = rng.choice(KINDS)(rng)
    lines = ["We solve this problem step by step."]
    for number, (done, left, sign, right) in enumerate(steps, start=1):
        result = OPERATORS[sign](left, right)
        lines.append(f"Step {number}: {done}. This is {left} {sign} {right} = {result}.")
    return question, "\n".join([*lines, f"So the answer to the question is {result}."])
