"""The text that the embedded model is pretrained on, which depends on its seed alone.

Sheets of arithmetic, word problems with step-by-step answers, and small Python functions with what
they return. The word problems have the frame of the GSM8K prompt, `Question: ... Answer:`, but none
states one quantity relative to another ("12 more than"), and none ends in `#### N`: both are left
to the bundled task (`task.py`).
"""

import random
import re
from collections.abc import Callable, Iterator

NAMES = (
    *("Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Kira"),
    *("Leo", "Mara", "Nils", "Olga", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wanda"),
    *("Yusuf", "Zoe"),
)
ITEMS = (
    *("apples", "books", "boxes", "cards", "coins", "cups", "eggs", "flowers", "hats", "lemons"),
    *("loaves", "marbles", "nails", "oranges", "pages", "pencils", "plants", "plates", "seeds"),
    *("shells", "stamps", "stickers", "stones", "tickets", "toys"),
)
CONTAINERS = ("bags", "baskets", "boxes", "drawers", "jars", "rows", "shelves")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
DONE_BY_THE_DAY = ("sold", "made", "counted", "packed")
DIGIT_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

SHEET_LINES = 10


def generate_documents(seed: int, count: int) -> Iterator[str]:
    """Yield `count` documents of a few hundred characters at most; fewer are a prefix of more."""
    if count < 0:
        raise ValueError(f"The number of documents is {count}; pass 0 or more.")
    rng = random.Random(seed)
    makers = (arithmetic_sheet, word_problem, python_function)
    for _ in range(count):
        yield rng.choices(makers, weights=(35, 50, 15))[0](rng)


def arithmetic_sheet(rng: random.Random) -> str:
    """A headed sheet of equations of one kind, most of them on numbers below 100."""
    heading, equation = rng.choice(SHEETS)
    lines = SHEET_LINES // 2 if heading == "Chains" else SHEET_LINES
    level = "#" * rng.randint(1, 4)
    return "\n".join([f"{level} {heading}", *(equation(rng) for _ in range(lines))])


def word_problem(rng: random.Random) -> str:
    """A question, its solution one equation a line, and the result in a sentence."""
    question, steps = rng.choice(PROBLEMS)(rng)
    lines = [f"{step}={_value(step)}" for step in steps]
    lines[0] = " " + lines[0]
    result = _value(steps[-1])
    return f"Question: {question}\nAnswer:" + "\n".join([*lines, f"The answer is {result}."])


def python_function(rng: random.Random) -> str:
    """The source of a small function and a few calls with their results in comments."""
    name, body, function = rng.choice(FUNCTIONS)(rng)
    arguments = [rng.randint(2, 40) for _ in range(3)]
    calls = [f"print({name}({x}))  # {function(x)}" for x in arguments]
    return "\n".join([f"def {name}(x):", *(f"    {line}" for line in body), "", *calls])


def _value(expression: str) -> int:
    """The value of `a+b`, `a-b` or `a*b` on non-negative integers."""
    left, sign, right = re.split(r"([-+*])", expression)
    return {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))


def _number(rng: random.Random) -> int:
    return rng.randint(1, 20) if rng.random() < 0.3 else rng.randint(2, 99)


def _equation(expression: str) -> str:
    return f"{expression}={_value(expression)}"


def _sum(rng: random.Random) -> str:
    return _equation(f"{_number(rng)}+{_number(rng)}")


def _difference(rng: random.Random) -> str:
    right = _number(rng)
    return _equation(f"{right + rng.randint(0, 80)}-{right}")


def _product(rng: random.Random) -> str:
    pair = [rng.randint(2, 9), rng.randint(2, 20)]
    rng.shuffle(pair)
    return _equation(f"{pair[0]}*{pair[1]}")


def _chain(rng: random.Random) -> str:
    """`a+b-c: a+b=d, d-c=e`: the result of one equation opens the next."""
    first, second = _number(rng), _number(rng)
    middle = first + second
    third = rng.randint(1, middle) if rng.random() < 0.5 else -_number(rng)
    step = f"-{third}" if third > 0 else f"+{-third}"
    return f"{first}+{second}{step}: {first}+{second}={middle}, {_equation(f'{middle}{step}')}"


SHEETS: tuple[tuple[str, Callable[[random.Random], str]], ...] = (
    *(("Sums", _sum), ("Sums", _sum), ("Differences", _difference), ("Products", _product)),
    ("Mixed", lambda rng: rng.choice((_sum, _difference, _product))(rng)),
    ("Chains", _chain),
)

Problem = tuple[str, list[str]]
"""The question, and its steps."""


def _gain(rng: random.Random) -> Problem:
    (name, item, a, b), got = _owner(rng), rng.choice(("finds", "buys", "gets", "makes"))
    story = f"{name} has {a} {item} and {got} {b} more."
    return f"{story} How many {item} does {name} have now?", [f"{a}+{b}"]


def _loss(rng: random.Random) -> Problem:
    name, item, b = rng.choice(NAMES), rng.choice(ITEMS), _number(rng)
    a, lost = b + rng.randint(1, 60), rng.choice(("sells", "loses", "gives away", "uses"))
    story = f"{name} has {a} {item} and {lost} {b} of them."
    return f"{story} How many {item} are left?", [f"{a}-{b}"]


def _gain_then_loss(rng: random.Random) -> Problem:
    name, item, a, b = _owner(rng)
    c = rng.randint(1, a + b)
    story = f"{name} has {a} {item}. On {rng.choice(DAYS)} {name} gets {b} and later sells {c}."
    return f"{story} How many {item} are left?", [f"{a}+{b}", f"{a + b}-{c}"]


def _loss_then_gain(rng: random.Random) -> Problem:
    name, item, b, c = _owner(rng)
    a = b + rng.randint(1, 60)
    story = f"{name} has {a} {item}. On {rng.choice(DAYS)} {name} sells {b} and then buys {c}."
    return f"{story} How many {item} does {name} have now?", [f"{a}-{b}", f"{a - b}+{c}"]


def _groups(rng: random.Random) -> Problem:
    item, groups, a, b = rng.choice(ITEMS), rng.choice(CONTAINERS), *_factors(rng)
    story = f"There are {a} {groups} with {b} {item} each."
    return f"{story} How many {item} are there in all?", [f"{a}*{b}"]


def _groups_and_rest(rng: random.Random) -> Problem:
    item, groups, a, b = rng.choice(ITEMS), rng.choice(CONTAINERS), *_factors(rng)
    name, c = rng.choice(NAMES), _number(rng)
    story = f"{name} has {a} {groups} with {b} {item} each and {c} other {item}."
    return f"{story} How many {item} does {name} have?", [f"{a}*{b}", f"{a * b}+{c}"]


def _together(rng: random.Random) -> Problem:
    first, second = rng.sample(NAMES, 2)
    item, a, b = rng.choice(ITEMS), _number(rng), _number(rng)
    story = f"{first} has {a} {item} and {second} has {b} {item}."
    return f"{story} How many {item} do they have together?", [f"{a}+{b}"]


def _gain_then_together(rng: random.Random) -> Problem:
    first, second = rng.sample(NAMES, 2)
    item, a, b, c = rng.choice(ITEMS), *(_number(rng) for _ in range(3))
    story = f"{first} has {a} {item}. {second} has {b} {item} and gets {c} more."
    return f"{story} How many {item} do they have together?", [f"{b}+{c}", f"{a}+{b + c}"]


def _three_days(rng: random.Random) -> Problem:
    (name, item, a, b), c = _owner(rng), _number(rng)
    (first, second), sold = rng.sample(DAYS, 2), rng.choice(DONE_BY_THE_DAY)
    story = f"On {first} {name} {sold} {a} {item}. On {second} {name} {sold} {b} and later {c}."
    return f"{story} How many {item} was that in all?", [f"{a}+{b}", f"{a + b}+{c}"]


def _two_days(rng: random.Random) -> Problem:
    """For one day or for both: the question decides."""
    name, item, a, b = _owner(rng)
    (first, second), sold = rng.sample(DAYS, 2), rng.choice(DONE_BY_THE_DAY)
    story = f"On {first} {name} {sold} {a} {item}. On {second} {name} {sold} {b} {item}."
    if rng.random() < 0.5:
        return f"{story} How many {item} was that on both days?", [f"{a}+{b}"]
    day, value = rng.choice(((first, a), (second, b)))
    return f"{story} How many {item} was that on {day}?", [f"{value}+0"]


def _price(rng: random.Random) -> Problem:
    """With one number too many: the thing asked for decides."""
    name, (first, second) = rng.choice(NAMES), rng.sample(ITEMS, 2)
    a, b, count = rng.randint(2, 20), rng.randint(2, 20), rng.randint(2, 9)
    item, price = rng.choice(((first, a), (second, b)))
    story = f"In the shop {first} cost {a} coins each and {second} cost {b} coins each."
    return f"{story} How many coins does {name} pay for {count} {item}?", [f"{count}*{price}"]


PROBLEMS: tuple[Callable[[random.Random], Problem], ...] = (
    *(_gain, _loss, _gain_then_loss, _loss_then_gain, _groups, _groups_and_rest),
    *(_together, _gain_then_together, _three_days, _two_days, _price),
)


def _owner(rng: random.Random) -> tuple[str, str, int, int]:
    return rng.choice(NAMES), rng.choice(ITEMS), _number(rng), _number(rng)


def _factors(rng: random.Random) -> tuple[int, int]:
    return rng.randint(2, 9), rng.randint(2, 20)


Function = tuple[str, list[str], Callable[[int], int]]


def _add_function(rng: random.Random) -> Function:
    n = rng.randint(1, 10)
    return f"add_{DIGIT_WORDS[n - 1]}", [f"return x + {n}"], lambda x: x + n


def _times_function(rng: random.Random) -> Function:
    n = rng.randint(2, 5)
    return f"times_{DIGIT_WORDS[n - 1]}", [f"return {n} * x"], lambda x: n * x


def _shift_function(rng: random.Random) -> Function:
    n, shift = rng.randint(2, 4), rng.randint(1, 20)
    body = [f"y = {n} * x", f"return y + {shift}"]
    return f"scale_and_add_{shift}", body, lambda x: n * x + shift


def _limit_function(rng: random.Random) -> Function:
    limit = rng.randint(5, 35)
    body = [f"if x > {limit}:", f"    return {limit}", "return x"]
    return f"at_most_{limit}", body, lambda x: min(x, limit)


def _parity_function(rng: random.Random) -> Function:
    even, odd = rng.randint(1, 9), rng.randint(1, 9)
    body = ["if x % 2 == 0:", f"    return x + {even}", f"return x + {odd}"]
    return "next_step", body, lambda x: x + (even if x % 2 == 0 else odd)


FUNCTIONS = (_add_function, _times_function, _shift_function, _limit_function, _parity_function)
