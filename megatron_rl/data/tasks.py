"""Generated tasks: questions with known answers, so that everything runs without a download.

A row follows from the task, its options and the row's number alone.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from megatron_rl.config.errors import DataError

PREFIX = "task:"
REVISION = 1  # raised when a task asks otherwise: rows that lie in a cache are then made anew
HARDEST = 10


@dataclass(frozen=True)
class TaskOptions:
    """How many questions, and how hard."""

    rows: int = 10_000
    difficulty: int = 1  # 1 to 10
    seed: int = 0


def arithmetic(chance: Random, difficulty: int) -> dict[str, Any]:
    """Sums, differences and from difficulty 3 on products. Difficulty adds digits and terms."""
    largest = 10 ** ((difficulty + 1) // 2) - 1
    terms = 2 + difficulty // 2
    text, value = _expression(chance, terms, largest, "+-*" if difficulty > 2 else "+-")
    return {"prompt": f"What is {text}? Answer with the number alone.", "answer": str(value)}


def sorting(chance: Random, difficulty: int) -> dict[str, Any]:
    """Numbers to put in rising order. Difficulty adds numbers and digits."""
    numbers = [chance.randrange(10 ** ((difficulty + 2) // 2)) for _ in range(2 + 2 * difficulty)]
    listed = " ".join(map(str, numbers))
    return {
        "prompt": f"Sort these numbers from smallest to largest: {listed}. Answer with the numbers alone, separated by spaces.",
        "answer": " ".join(map(str, sorted(numbers))),
    }


def countdown(chance: Random, difficulty: int) -> dict[str, Any]:
    """Numbers from which to make another, as in the television game. Difficulty adds numbers. `answer` is one way of many."""
    count, value = 2 + (difficulty + 1) // 2, 0
    while value < 1:  # a target is above zero
        numbers = [chance.randrange(1, 10 + 9 * difficulty) for _ in range(count)]
        text, value = str(numbers[0]), numbers[0]
        for number in numbers[1:]:
            sign = chance.choice("+-" if value * number > 1000 else "+-*")
            text, value = f"({text} {sign} {number})", _apply(sign, value, number)
    shown = numbers.copy()
    chance.shuffle(shown)
    return {
        "prompt": f"Make {value} from the numbers {', '.join(map(str, shown))} with +, -, * and /, using each "
        "number exactly once. Answer with the expression alone.",
        "answer": text[1:-1],
        "numbers": shown,
        "target": value,
    }


def digits(chance: Random, difficulty: int) -> dict[str, Any]:
    """Digits to put in rising order, asked without a word: the shortest task. Difficulty adds digits.

    `demonstration` is a teacher to learn from at first who is right one time in three: rising, falling, or just as they came.
    """
    drawn = "".join(str(chance.randrange(10)) for _ in range(3 + difficulty))
    rising = "".join(sorted(drawn))
    return {"prompt": drawn, "answer": rising, "demonstration": chance.choice([rising, rising[::-1], drawn])}


type Task = Callable[[Random, int], dict[str, Any]]
TASKS: Mapping[str, Task] = {"arithmetic": arithmetic, "sorting": sorting, "countdown": countdown, "digits": digits}


def task_rows(name: str, options: TaskOptions) -> Iterator[dict[str, Any]]:
    """The rows of a task, from the first."""
    for row in range(options.rows):
        yield TASKS[name](Random(f"{name}/{options.seed}/{options.difficulty}/{row}"), options.difficulty)


def task_options(name: str, given: Mapping[str, Any]) -> TaskOptions:
    """Options as written in the settings, or the error that says what may be written."""
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, 1)
        meant = f"Did you mean {PREFIX}{nearest[0]}?" if nearest else f"There are {', '.join(PREFIX + task for task in TASKS)}."
        raise DataError(f"data source {PREFIX}{name}: there is no such task. {meant}")
    known = [field.name for field in fields(TaskOptions)]
    for option, value in given.items():
        if option not in known:
            raise DataError(f"data source {PREFIX}{name}: unknown option {option}. Options are {', '.join(known)}.")
        smallest = 0 if option == "seed" else 1
        largest = HARDEST if option == "difficulty" else None
        if type(value) is not int or value < smallest or (largest is not None and value > largest):
            limit = f"from {smallest} to {largest}" if largest else f"of at least {smallest}"
            raise DataError(f"data source {PREFIX}{name}: option {option} = {value}: expected a whole number {limit}.")
    return TaskOptions(**given)


def _expression(chance: Random, terms: int, largest: int, signs: str) -> tuple[str, int]:
    """A sum of products, as it is written and what it comes to."""
    text, total = "", 0
    product, sign = 0, "+"
    for term in range(terms):
        number = chance.randrange(1, largest + 1)
        following = chance.choice(signs) if term else "+"
        if term and following == "*":
            text, product = f"{text} * {number}", product * number
        else:
            total = _apply(sign, total, product)
            text, product, sign = f"{text} {following} {number}" if term else str(number), number, following
    return text, _apply(sign, total, product)


def _apply(sign: str, left: int, right: int) -> int:
    match sign:
        case "+":
            return left + right
        case "-":
            return left - right
        case _:
            return left * right
