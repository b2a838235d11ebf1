"""Kinds that work on a text or a list: sorting, picking out, reformatting."""

import json
from collections.abc import Iterator
from random import Random

from instruction_kinds.english import joined, phrased, word_list
from instruction_kinds.record import Record

WORD_GROUPS = [
    word_list("apple pear banana cherry grape lemon mango orange plum peach"),
    word_list("lion tiger bear wolf zebra monkey giraffe camel fox alpaca"),
    word_list("table chair lamp shelf mirror carpet sofa desk bed clock"),
    word_list("Anna Ben Clara David Emma Frank Greta Henry Ida Jonas"),
    word_list("river lake ocean island valley mountain desert forest beach cliff"),
    word_list("bread cheese butter honey soup rice salad noodles yoghurt jam"),
    word_list("red blue green yellow purple white black brown pink grey"),
    word_list("violin drum flute piano guitar trumpet harp cello organ bell"),
]
FIRST = word_list(
    "Lena Omar Julia Pedro Sofia Martin Alice Tomas Ruth Victor Hanna Leo Marta Simon Eva Daniel Clara Peter Nora Adam"
)
LAST = word_list(
    "Berg Costa Fischer Hill Jensen Klein Lopez Moore Novak Olsen Perez Quinn Rossi Stone Taylor Vargas Weber Young"
)
CITIES = word_list("Lima Oslo Paris Dublin Vienna Madrid Boston Prague Lisbon Athens Toronto Sydney")
SHOPS = word_list("mill bakery nursery library museum school clinic studio market harbour")
MONTHS = word_list("January February March April May June July August September October November December")
FRUIT_PRICES = {"apples": 3, "pears": 4, "plums": 2, "lemons": 9, "cherries": 6, "grapes": 5, "figs": 7, "melons": 8}
JOBS = word_list("baker nurse farmer pilot singer lawyer painter plumber tailor teacher")


def sorted_words(rng: Random) -> Iterator[Record]:
    asks = [
        "Sort these words in alphabetical order.",
        "Put the words in alphabetical order.",
        "Arrange the following words alphabetically.",
    ]
    for group in 3 * WORD_GROUPS:
        words = rng.sample(group, k=rng.randint(4, 5))
        yield Record(rng.choice(asks), ", ".join(words), ", ".join(sorted(words)))


def handled_lists(rng: Random) -> Iterator[Record]:
    for group in WORD_GROUPS:
        words = rng.sample(group, k=5)
        listed = ", ".join(words)
        place = rng.randrange(5)
        ordinal = ("first", "second", "third", "fourth", "last")[place]
        yield Record(f"What is the {ordinal} word in this list?", listed, f"The {ordinal} word is '{words[place]}'.")
        longest = max(words, key=len)
        if sum(len(word) == len(longest) for word in words) == 1:
            yield Record("Which is the longest word in this list?", listed, f"The longest word is '{longest}'.")
        numbered = "\n".join(f"{i}. {word}" for i, word in enumerate(words, 1))
        bulleted = "\n".join(f"- {word}" for word in words)
        reordered = [
            ("Write the list in reverse order.", ", ".join(reversed(words))),
            ("Turn this list into a bulleted list.", bulleted),
            ("Number the items in this list.", numbered),
        ]
        for ask, said in rng.sample(reordered, k=2):
            yield Record(ask, listed, said)


def changed_case(rng: Random) -> Iterator[Record]:
    for group in WORD_GROUPS:
        words = " ".join(rng.sample(group, k=3)).lower()
        yield Record("Write this in capital letters.", words, words.upper())
        yield Record("Write this in lower case.", words.upper(), words)


def as_json(rng: Random) -> Iterator[Record]:
    asks = [
        "Write this information as JSON.",
        "Turn the sentence into a JSON object.",
        "Convert this into JSON with the keys name, age and city.",
    ]
    for _ in range(12):
        name, age, city = rng.choice(FIRST), rng.randint(18, 75), rng.choice(CITIES)
        yield Record(
            rng.choice(asks),
            f"{name} is {age} years old and lives in {city}.",
            json.dumps({"name": name, "age": age, "city": city}),
        )
    for _ in range(8):
        things = rng.sample(sorted(FRUIT_PRICES), k=3)
        listed = joined([f"{thing} cost {FRUIT_PRICES[thing]} dollars" for thing in things])
        prices = json.dumps({thing: FRUIT_PRICES[thing] for thing in things})
        yield Record("Write the prices as a JSON object.", f"{listed[0].upper()}{listed[1:]}.", prices)


def as_csv(rng: Random) -> Iterator[Record]:
    asks = [
        "Write this as CSV with the columns name and job.",
        "Turn the text into a CSV table with a header line: name,job.",
    ]
    for _ in range(12):
        people = list(zip(rng.sample(FIRST, k=3), rng.sample(JOBS, k=3), strict=True))
        text = joined([f"{name} is a {job}" for name, job in people])
        yield Record(rng.choice(asks), f"{text}.", "\n".join(["name,job", *(f"{name},{job}" for name, job in people)]))


def extracted_emails(rng: Random) -> Iterator[Record]:
    asks = [
        "Extract the email address from the text.",
        "Find the email address.",
        "What is the email address in this text?",
    ]
    texts = [
        "Please send your order to {mail} before Friday.",
        "{first} {last} can be reached at {mail} or by phone.",
        "Questions about the course? Write to {mail}.",
        "My new address is {mail}, so please do not use the old one.",
    ]
    for _ in range(14):
        first, last, shop = rng.choice(FIRST), rng.choice(LAST), rng.choice(SHOPS)
        mail = f"{first.lower()}.{last.lower()}@{shop}.example"
        yield Record(rng.choice(asks), phrased(rng, texts, first=first, last=last, mail=mail), mail)


def extracted_dates(rng: Random) -> Iterator[Record]:
    asks = [
        "Extract the date from the text.",
        "Which date is mentioned in the text?",
        "Find the date in this sentence.",
    ]
    texts = [
        "The meeting in {city} took place on {date} at the town hall.",
        "{first} was born on {date} in {city}.",
        "The parcel left {city} on {date} and never arrived.",
        "On {date} the old bridge was closed for repairs.",
    ]
    for _ in range(14):
        date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1950, 2024)}"
        yield Record(
            rng.choice(asks), phrased(rng, texts, first=rng.choice(FIRST), city=rng.choice(CITIES), date=date), date
        )


def extracted_names(rng: Random) -> Iterator[Record]:
    asks = [
        "List the names of the people in the text.",
        "Extract all names of people.",
        "Which people are mentioned in this text?",
    ]
    texts = [
        "{a} and {b} went to {city} with {c}.",
        "In the morning {a} met {b} at the bakery, and later {c} joined them.",
        "The prize went to {a}, while {b} and {c} shared second place.",
        "{a} cooked the soup, {b} set the table and {c} washed the dishes.",
    ]
    for _ in range(16):
        a, b, c = rng.sample(FIRST, k=3)
        yield Record(rng.choice(asks), phrased(rng, texts, a=a, b=b, c=c, city=rng.choice(CITIES)), f"{a}, {b}, {c}")


def extracted_amounts(rng: Random) -> Iterator[Record]:
    texts = [
        ("Call the office at {phone} if you are late.", "Extract the phone number.", "{phone}"),
        ("You can reach the {shop} by phone at {phone} on weekdays.", "What is the phone number?", "{phone}"),
        (
            "{first} paid {price} dollars for a lamp in {city}.",
            "How much did the lamp cost?",
            "The lamp cost {price} dollars.",
        ),
        (
            "A room in {city} costs {price} euros a night.",
            "What is the price of the room?",
            "The room costs {price} euros a night.",
        ),
        ("{first} moved from {city} to {other} last year.", "Which cities are named in the text?", "{city}, {other}"),
        ("The flight goes from {city} to {other} without a stop.", "List the cities in the text.", "{city}, {other}"),
    ]
    for text, ask, said in 4 * texts:
        city, other = rng.sample(CITIES, k=2)
        fields = {
            "phone": f"555-{rng.randint(100, 999)}-{rng.randint(1000, 9999)}",
            "price": rng.randint(15, 180),
            "first": rng.choice(FIRST),
            "city": city,
            "other": other,
            "shop": rng.choice(SHOPS),
        }
        yield Record(ask, text.format(**fields), said.format(**fields))
