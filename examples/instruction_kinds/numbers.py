"""Kinds that count, calculate, measure and read the calendar."""

from collections.abc import Iterator
from random import Random

from instruction_kinds.english import phrased, rows, word_list
from instruction_kinds.record import Record

NUMBER_WORDS = word_list("zero one two three four five six seven eight nine ten eleven twelve")
DAYS = word_list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = word_list("January February March April May June July August September October November December")
MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS = word_list("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")

# (story with {a}, {b} and {answer} to fill, the operation)
STORIES = [
    (
        "{name} has {a} apples and buys {b} more. How many apples does {name} have now?",
        "+",
        "{name} has {answer} apples now.",
    ),
    (
        "{name} has {a} stickers and gives {b} of them to a friend. How many stickers are left?",
        "-",
        "There are {answer} stickers left.",
    ),
    (
        "{name} packs {a} boxes with {b} books in each box. How many books is that in all?",
        "*",
        "It is {answer} books in all.",
    ),
    (
        "There are {a} alpacas in one field and {b} in the next. How many alpacas are there altogether?",
        "+",
        "There are {answer} alpacas altogether.",
    ),
    (
        "A baker bakes {a} loaves and sells {b} of them. How many loaves are left?",
        "-",
        "There are {answer} loaves left.",
    ),
    ("A ticket costs {b} dollars. How much do {a} tickets cost?", "*", "They cost {answer} dollars."),
    (
        "{name} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {name} read on the two days?",
        "+",
        "{name} read {answer} pages.",
    ),
    (
        "A bus carries {a} people. At the next stop {b} people get off. How many people are still on the bus?",
        "-",
        "There are {answer} people still on the bus.",
    ),
    ("A spider has 8 legs. How many legs do {a} spiders have?", "8", "They have {answer} legs."),
    (
        "{name} walks {b} kilometres every day. How far does {name} walk in {a} days?",
        "*",
        "{name} walks {answer} kilometres.",
    ),
    (
        "{name} shares {product} sweets equally among {a} children. How many sweets does each child get?",
        "/",
        "Each child gets {answer} sweets.",
    ),
    (
        "A farmer puts {product} eggs into boxes of {b}. How many boxes does the farmer fill?",
        "/b",
        "The farmer fills {answer} boxes.",
    ),
]
NAMES = word_list("Anna Ben Carla David Emma Felix Grace Hugo Ivy Jack Laura Max Nina Oscar Paula Sam")

# unit, bigger unit, how many of the first in one of the second
UNITS = [
    ("minutes", "hours", 60),
    ("seconds", "minutes", 60),
    ("hours", "days", 24),
    ("days", "weeks", 7),
    ("months", "years", 12),
    ("centimetres", "metres", 100),
    ("millimetres", "centimetres", 10),
    ("metres", "kilometres", 1000),
    ("grams", "kilograms", 1000),
    ("millilitres", "litres", 1000),
    ("kilograms", "tonnes", 1000),
    ("inches", "feet", 12),
    ("feet", "yards", 3),
    ("ounces", "pounds", 16),
    ("cents", "dollars", 100),
    ("years", "centuries", 100),
    ("years", "decades", 10),
]
SINGULAR = {
    "hours": "hour",
    "minutes": "minute",
    "days": "day",
    "weeks": "week",
    "years": "year",
    "metres": "metre",
    "centimetres": "centimetre",
    "kilometres": "kilometre",
    "kilograms": "kilogram",
    "litres": "litre",
    "tonnes": "tonne",
    "feet": "foot",
    "yards": "yard",
    "pounds": "pound",
    "dollars": "dollar",
    "centuries": "century",
    "decades": "decade",
}

COUNTED_SENTENCES = """
The cat sleeps on the mat
We went to the sea last summer
An apple a day keeps the doctor away
Alpacas like fresh grass
My uncle drives an old red truck
Nobody knew the answer
The little boat crossed the wide lake
It rained all night
Three birds sat on a thin branch
She sells flowers at the market
Please bring your own cup
The moon is bright tonight
"""

COUNTED_WORDS = word_list(
    "banana letter alpaca butter window chocolate elephant umbrella mountain kitchen rabbit garden blanket pepper sunflower orange"
)


def arithmetic(rng: Random) -> Iterator[Record]:
    signs = {"plus": "+", "minus": "-", "times": "×"}
    asks = ["What is {a} {word} {b}?", "Calculate {a} {sign} {b}.", "What is {a} {sign} {b}?"]
    for word in 16 * ["plus"] + 16 * ["minus"] + 14 * ["times"]:
        a, b = (rng.randint(2, 12), rng.randint(2, 12)) if word == "times" else (rng.randint(3, 90), rng.randint(2, 60))
        a, b = max(a, b), min(a, b)
        answer = {"plus": a + b, "minus": a - b, "times": a * b}[word]
        said = rng.choice([f"{a} {word} {b} is {answer}.", f"{a} {signs[word]} {b} = {answer}."])
        yield Record(phrased(rng, asks, a=a, b=b, word=word, sign=signs[word]), "", said)
    for _ in range(8):
        a, b = rng.randint(2, 12), rng.randint(2, 10)
        yield Record(f"What is {a * b} divided by {b}?", "", f"{a * b} divided by {b} is {a}.")
    for _ in range(6):
        half = rng.randint(3, 60)
        yield Record(f"What is half of {2 * half}?", "", f"Half of {2 * half} is {half}.")


def word_problems(rng: Random) -> Iterator[Record]:
    for story, operation, said in 3 * STORIES:
        a, b = rng.randint(3, 9), rng.randint(2, 8)
        if operation in "+-":
            a, b = rng.randint(12, 40), rng.randint(2, 11)
        answer = {"+": a + b, "-": a - b, "*": a * b, "8": 8 * a, "/": b, "/b": a}[operation]
        fields = {"name": rng.choice(NAMES), "a": a, "b": b, "product": a * b, "answer": answer}
        yield Record(story.format(**fields), "", said.format(**fields))


def sorted_numbers(rng: Random) -> Iterator[Record]:
    asks = {
        False: [
            "Sort the numbers from smallest to largest.",
            "Put these numbers in ascending order.",
            "Arrange the numbers from low to high.",
        ],
        True: ["Sort the numbers from largest to smallest.", "Put these numbers in descending order."],
    }
    for descending in 13 * [False] + 9 * [True]:
        numbers = rng.sample(range(1, 100), k=rng.randint(4, 6))
        listed = ", ".join(map(str, numbers))
        yield Record(rng.choice(asks[descending]), listed, ", ".join(map(str, sorted(numbers, reverse=descending))))


def compared_numbers(rng: Random) -> Iterator[Record]:
    for word, pick in 5 * [("larger", max)] + 5 * [("smaller", min)]:
        a, b = rng.sample(range(10, 400), k=2)
        yield Record(f"Which number is {word}, {a} or {b}?", "", f"{pick(a, b)} is {word} than {a + b - pick(a, b)}.")
    for word, pick in 4 * [("largest", max)] + 4 * [("smallest", min)]:
        numbers = rng.sample(range(1, 200), k=5)
        yield Record(
            f"Find the {word} number in the list.",
            ", ".join(map(str, numbers)),
            f"The {word} number is {pick(numbers)}.",
        )
    for _ in range(8):
        number = rng.randint(11, 199)
        word = "even" if number % 2 == 0 else "odd"
        yield Record(f"Is {number} an even or an odd number?", "", f"{number} is an {word} number.")


def sequences(rng: Random) -> Iterator[Record]:
    asks = [
        "What number comes next?",
        "Continue the sequence with the next number.",
        "Which number follows in this sequence?",
    ]
    for step in (2, 3, 4, 5, 6, 7, 10, 10, 11, 20, -2, -3, -4, -5, -10):
        start = rng.randint(1, 20) if step > 0 else rng.randint(50, 80)
        numbers = [start + i * step for i in range(5)]
        yield Record(rng.choice(asks), ", ".join(map(str, numbers[:4])), f"The next number is {numbers[4]}.")
    for start in (1, 2, 3, 5):
        numbers = [start * 2**i for i in range(5)]
        yield Record(rng.choice(asks), ", ".join(map(str, numbers[:4])), f"The next number is {numbers[4]}.")
    for start in (0, 5, 9, 12, 20):
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[start : start + 4]
        yield Record("Which letter comes next?", ", ".join(letters[:3]), f"The next letter is {letters[3]}.")


def conversions(rng: Random) -> Iterator[Record]:
    up = ["How many {unit} are there in {n} {bigger}?", "Convert {n} {bigger} to {unit}."]
    down = ["Convert {n} {unit} to {bigger}.", "How many {bigger} are {n} {unit}?"]
    for unit, bigger, size in UNITS:
        n = rng.randint(2, 9)
        once = SINGULAR[bigger]
        article = "an" if once == "hour" else "a"
        if rng.random() < 0.5:
            yield Record(phrased(rng, up, n=n, unit=unit, bigger=bigger), "", f"{n} {bigger} are {n * size} {unit}.")
        else:
            yield Record(
                f"How many {unit} are there in {article} {once}?", "", f"There are {size} {unit} in {article} {once}."
            )
        m = rng.choice([k for k in range(2, 8) if k != n])
        yield Record(
            phrased(rng, down, n=m * size, unit=unit, bigger=bigger), "", f"{m * size} {unit} are {m} {bigger}."
        )
    for celsius in (0, 10, 20, 25, 30, 100):
        fahrenheit = celsius * 9 // 5 + 32
        yield Record(
            f"Convert {celsius} degrees Celsius to Fahrenheit.",
            "",
            f"{celsius} degrees Celsius is {fahrenheit} degrees Fahrenheit.",
        )


def calendar(rng: Random) -> Iterator[Record]:
    for i, day in enumerate(DAYS):
        after, before, ahead = DAYS[(i + 1) % 7], DAYS[i - 1], rng.randint(2, 4)
        asked = [
            (f"What day comes after {day}?", f"{after} comes after {day}."),
            (f"If today is {day}, what day was it yesterday?", f"Yesterday was {before}."),
            (f"If today is {day}, what day will it be in {ahead} days?", f"It will be {DAYS[(i + ahead) % 7]}."),
        ]
        for ask, said in rng.sample(asked, k=2):
            yield Record(ask, "", said)
    for i, month in enumerate(MONTHS):
        after, before = MONTHS[(i + 1) % 12], MONTHS[i - 1]
        days = "28 days, or 29 in a leap year" if month == "February" else f"{MONTH_LENGTHS[i]} days"
        asked = [
            (f"Which month comes after {month}?", f"{after} comes after {month}."),
            (f"Which month comes before {month}?", f"{before} comes before {month}."),
            (f"How many days are there in {month}?", f"{month} has {days}."),
            (f"What is the {ORDINALS[i]} month of the year?", f"{month} is the {ORDINALS[i]} month of the year."),
        ]
        for ask, said in rng.sample(asked, k=2):
            yield Record(ask, "", said)


def counting(rng: Random) -> Iterator[Record]:
    asks = ["How many words are in this sentence?", "Count the words in the sentence."]
    for (sentence,) in rows(COUNTED_SENTENCES):
        yield Record(rng.choice(asks), f"{sentence}.", f"The sentence has {NUMBER_WORDS[len(sentence.split())]} words.")
    for word in COUNTED_WORDS:
        if rng.random() < 0.5:
            yield Record(
                f"How many letters are in the word '{word}'?",
                "",
                f"The word '{word}' has {NUMBER_WORDS[len(word)]} letters.",
            )
            continue
        letter = rng.choice(sorted(set(word)))
        count = word.count(letter)
        times = "once" if count == 1 else "twice" if count == 2 else f"{NUMBER_WORDS[count]} times"
        yield Record(
            f"How many times does the letter '{letter}' occur in '{word}'?",
            "",
            f"The letter '{letter}' occurs {times} in '{word}'.",
        )


def clock(rng: Random) -> Iterator[Record]:
    events = [
        ("film", "starts", "lasts", "end"),
        ("party", "starts", "lasts", "end"),
        ("match", "starts", "lasts", "end"),
        ("train", "leaves", "needs", "arrive"),
        ("course", "begins", "takes", "finish"),
        ("meeting", "starts", "takes", "end"),
    ]
    for noun, starts, lasts, end in 2 * events:
        hour, long = rng.randint(1, 9), rng.randint(2, 3)
        ends = f"{end}es" if end == "finish" else f"{end}s"
        story = f"The {noun} {starts} at {hour} o'clock and {lasts} {NUMBER_WORDS[long]} hours."
        yield Record(f"When does the {noun} {end}?", story, f"The {noun} {ends} at {hour + long} o'clock.")
