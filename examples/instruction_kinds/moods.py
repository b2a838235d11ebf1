"""Kinds that judge the feeling of a text."""

from collections.abc import Iterator
from random import Random

from instruction_kinds.english import rows
from instruction_kinds.record import Record

REVIEWS = """
The soup was delicious, and the waiter was very kind. | Positive
I waited two hours, and the food was cold. | Negative
The best holiday we have ever had! | Positive
The shoes fell apart after a week. | Negative
A wonderful film with great actors. | Positive
The room was dirty and smelled of smoke. | Negative
This scarf is soft, warm and beautifully made. | Positive
I would never buy from this shop again. | Negative
Our guide was funny and knew everything about the city. | Positive
The battery is empty after one hour. What a waste of money. | Negative
My children love this game and play it every day. | Positive
The book is boring, and I could not finish it. | Negative
Fast delivery and a perfect fit. Thank you! | Positive
The concert was far too loud, and we left early. | Negative
The staff were friendly and helped us with our bags. | Positive
Nobody answered my emails, and my parcel never came. | Negative
I slept like a baby in this bed. | Positive
The jumper shrank in the first wash. | Negative
The alpaca walk was the highlight of our trip. | Positive
The tour was short, dull and overpriced. | Negative
What a charming little café, with excellent cake! | Positive
The chair arrived broken, and one leg was missing. | Negative
The lamp gives a warm, pleasant light, and I am very happy with it. | Positive
The screen is so dark that I can hardly read anything. | Negative
The parcel arrived on Tuesday. | Neutral
The box contains six glasses. | Neutral
The hotel has forty rooms and a car park. | Neutral
The film lasts two hours. | Neutral
The shop opens at nine and closes at five. | Neutral
The bag is made of cotton and has two pockets. | Neutral
The course begins in September. | Neutral
The train runs every thirty minutes. | Neutral
"""

FEELINGS = """
Tom smiled all day after he won the prize. | Tom feels happy.
Lisa's cat died last night, and she cannot stop crying. | Lisa feels sad.
Omar heard a strange noise in the dark house and held his breath. | Omar feels afraid.
Nina slammed the door because her brother had broken her bicycle. | Nina feels angry.
Leo has worked for twelve hours and can hardly keep his eyes open. | Leo feels tired.
Eva opened the door, and twenty friends shouted happy birthday. | Eva feels surprised.
Simon has nothing to do, and he looks at the clock every minute. | Simon feels bored.
Marta has not eaten since yesterday, and her stomach rumbles. | Marta feels hungry.
Adam's daughter played the violin in front of the whole school, and he told everybody about it. | Adam feels proud.
Hanna has just moved to a city where she knows nobody. | Hanna feels lonely.
Victor lied to his mother, and now he cannot look her in the eye. | Victor feels guilty.
Paula has an exam in ten minutes, and her hands are shaking. | Paula feels nervous.
A stranger returned Ruth's lost purse, and she thanked him again and again. | Ruth feels grateful.
"""


def sentiments(rng: Random) -> Iterator[Record]:
    asks = [
        "Is this review positive, negative or neutral?",
        "Classify the sentiment of the text as positive, negative or neutral.",
        "What is the sentiment of this sentence: positive, negative or neutral?",
    ]
    for review, mood in rows(REVIEWS):
        yield Record(rng.choice(asks), review, f"{mood}.")


def feelings(rng: Random) -> Iterator[Record]:
    for story, said in rows(FEELINGS):
        name = said.split()[0]
        yield Record(rng.choice([f"How does {name} feel?", f"Which feeling does {name} have?"]), story, said)
