"""Kinds about the world that follow from a table: animals, groups, languages, jobs."""

from collections.abc import Iterator
from random import Random

from instruction_kinds.english import (
    capitalised,
    joined,
    phrased,
    rows,
    with_article,
    word_list,
)
from instruction_kinds.record import Record

# animal | young
ANIMALS = """
cow | calf
horse | foal
sheep | lamb
goat | kid
pig | piglet
dog | puppy
cat | kitten
hen | chick
duck | duckling
goose | gosling
swan | cygnet
lion | cub
bear | cub
deer | fawn
kangaroo | joey
frog | tadpole
alpaca | cria
llama | cria
elephant | calf
eagle | eaglet
"""

HOMES = """
honeybees | in a hive
most birds | in a nest
a wild rabbit | in a burrow
a dog | in a kennel
pigs | in a sty
horses | in a stable
a beaver | in a lodge
fish | in water
ants | in a nest
"""

SOUNDS = """
dog | barks
cat | meows
cow | moos
sheep | bleats
horse | neighs
pig | grunts
duck | quacks
lion | roars
bee | buzzes
owl | hoots
snake | hisses
donkey | brays
wolf | howls
mouse | squeaks
frog | croaks
alpaca | hums
"""

# group | its members, for classifying, odd ones out and naming three
GROUPS = """
fruit | apple, banana, cherry, pear, mango, grape, peach, plum
vegetable | carrot, onion, cabbage, spinach, broccoli, leek, turnip
mammal | dog, whale, bat, alpaca, horse, mouse, elephant, tiger
bird | eagle, penguin, sparrow, owl, duck, parrot, swan
insect | ant, bee, butterfly, beetle, mosquito, moth
fish | salmon, tuna, trout, cod, herring, carp
reptile | snake, lizard, crocodile, turtle, gecko
metal | iron, gold, silver, copper, zinc, tin
colour | red, blue, green, yellow, purple, brown
musical instrument | piano, violin, flute, drum, trumpet, harp
piece of furniture | table, chair, sofa, wardrobe, desk, bookcase
vehicle | car, bus, truck, bicycle, van, tractor
tool | hammer, saw, screwdriver, drill, spade, axe
piece of clothing | shirt, coat, sock, skirt, scarf, jumper
tree | oak, pine, maple, birch, willow, cedar
flower | rose, tulip, daisy, lily, daffodil, orchid
drink | tea, coffee, milk, lemonade, cocoa
sport | football, tennis, swimming, hockey, rowing, judo
planet | Mars, Venus, Saturn, Jupiter, Neptune, Mercury
language | French, Spanish, Arabic, Hindi, Japanese, Polish
"""
PLURAL_GROUPS = {
    "fish": "fish",
    "piece of furniture": "pieces of furniture",
    "piece of clothing": "pieces of clothing",
}
# named without an article
MASS_WORDS = word_list("""
spinach broccoli iron gold silver copper zinc tin tea coffee milk lemonade cocoa
football tennis swimming hockey rowing judo red blue green yellow purple brown
""")

JOBS = """
baker | makes and sells bread and cakes
teacher | helps pupils to learn
doctor | treats people who are ill
vet | treats sick animals
pilot | flies aeroplanes
carpenter | makes and repairs things made of wood
plumber | fits and repairs water pipes
tailor | makes and alters clothes
farmer | grows crops and keeps animals
judge | decides cases in a court of law
librarian | looks after books and helps people to find them
architect | designs buildings
journalist | gathers news and writes about it
shepherd | looks after sheep
chef | cooks food in a restaurant
firefighter | puts out fires and rescues people
dentist | looks after people's teeth
gardener | looks after plants and gardens
translator | turns a text from one language into another
shearer | cuts the fleece off sheep or alpacas
astronomer | studies the stars and planets
mechanic | repairs cars and other machines
"""

USES = """
an umbrella | to stay dry in the rain
a thermometer | to measure temperature
a compass | to find which way is north
a ladder | to climb up to high places
a calendar | to keep track of the days and months
a key | to open a lock
a telescope | to look at things that are far away
a microscope | to see things that are very small
a kettle | to boil water
a needle | to sew cloth
a map | to find the way
a fridge | to keep food cold
a broom | to sweep the floor
an anchor | to hold a ship in one place
a ruler | to measure length and draw straight lines
a pillow | to rest the head on in bed
scales | to find out how heavy something is
a dictionary | to look up the meaning of words
a rope | to tie or pull things
a torch | to see in the dark
a bell | to call people or give a signal
a spinning wheel | to turn fibre into yarn
"""

# English | Spanish | French | German
TRANSLATIONS = """
hello | hola | bonjour | hallo
thank you | gracias | merci | danke
yes | sí | oui | ja
no | no | non | nein
water | agua | eau | Wasser
bread | pan | pain | Brot
house | casa | maison | Haus
dog | perro | chien | Hund
cat | gato | chat | Katze
book | libro | livre | Buch
red | rojo | rouge | rot
sun | sol | soleil | Sonne
friend | amigo | ami | Freund
good night | buenas noches | bonne nuit | gute Nacht
milk | leche | lait | Milch
"""

# a colour or a trait | what has it, for filling in the blank
BLANKS = """
The sky is ___ on a clear day. | blue
Grass is usually ___. | green
Ice is frozen ___. | water
A week has ___ days. | seven
Bees make ___. | honey
Cows give ___. | milk
We see with our ___. | eyes
We hear with our ___. | ears
The Earth goes around the ___. | Sun
A year has twelve ___. | months
A triangle has ___ sides. | three
Snow is ___. | white
An alpaca is shorn once a ___. | year
Hens lay ___. | eggs
In autumn many trees lose their ___. | leaves
You write on a blackboard with ___. | chalk
A bicycle has two ___. | wheels
We sleep in a ___. | bed
Bread is baked in an ___. | oven
Fire is hot, but ice is ___. | cold
The Sun rises in the ___. | east
The Sun sets in the ___. | west
A doctor works in a hospital, and a teacher works in a ___. | school
A bird can fly because it has ___. | wings
Wool comes from ___. | sheep
An hour has sixty ___. | minutes
"""


def animals(rng: Random) -> Iterator[Record]:
    asks = ["What is a young {animal} called?", "What do you call the young of {an_animal}?"]
    for animal, young in rows(ANIMALS):
        said = f"{capitalised(with_article('young ' + animal))} is called {with_article(young)}."
        yield Record(phrased(rng, asks, animal=animal, an_animal=with_article(animal)), "", said)
    for animal, home in rows(HOMES):
        one = animal.startswith("a ")
        said = f"{capitalised(animal)} {'lives' if one else 'live'} {home}."
        yield Record(f"Where {'does' if one else 'do'} {animal} live?", "", said)
    for animal, sound in rows(SOUNDS):
        ask = rng.choice(
            [
                f"What sound does {with_article(animal)} make?",
                f"Which verb describes the sound of {with_article(animal)}?",
            ]
        )
        said = f"{capitalised(with_article(animal))} {sound}."
        yield Record(ask, "", said)


def groups() -> dict[str, list[str]]:
    return {group: members.split(", ") for group, members in rows(GROUPS)}


def plural_group(group: str) -> str:
    return PLURAL_GROUPS.get(group, f"{group}s")


def named(member: str) -> str:
    """The member as a subject: 'a carrot', but 'gold' and 'Mars'."""
    return member if member in MASS_WORDS or member[0].isupper() else with_article(member)


def classified(rng: Random) -> Iterator[Record]:
    for group, members in groups().items():
        for member in rng.sample(members, k=rng.choice([1, 2])):
            others = rng.sample([other for other in groups() if other != group and not overlapping(group, other)], k=2)
            options = [group, *others]
            rng.shuffle(options)
            listed = joined([with_article(option) for option in options], last="or")
            yield Record(f"Is {named(member)} {listed}?", "", f"{capitalised(named(member))} is {with_article(group)}.")
    for _ in range(14):
        first, second = rng.choice(
            [("fruit", "vegetable"), ("mammal", "bird"), ("metal", "planet"), ("tree", "tool"), ("insect", "fish")]
        )
        ones, twos = rng.sample(groups()[first], k=3), rng.sample(groups()[second], k=3)
        mixed = ones + twos
        rng.shuffle(mixed)
        headings = f"{capitalised(plural_group(first))}: {', '.join(w for w in mixed if w in ones)}\n"
        headings += f"{capitalised(plural_group(second))}: {', '.join(w for w in mixed if w in twos)}"
        ask = f"Sort these words into {plural_group(first)} and {plural_group(second)}."
        yield Record(ask, ", ".join(mixed), headings)


def overlapping(group: str, other: str) -> bool:
    """Pairs whose members a reader may put in either group (an orchid's colour, a rose bush)."""
    pairs = [
        {"tree", "flower"},
        {"fruit", "tree"},
        {"fruit", "colour"},
        {"metal", "colour"},
        {"flower", "colour"},
        {"metal", "planet"},
    ]
    return {group, other} in pairs


def odd_ones_out(rng: Random) -> Iterator[Record]:
    asks = ["Which word does not belong?", "Find the odd one out.", "Which of these is the odd one out?"]
    for group, members in [*groups().items(), *rng.sample(list(groups().items()), k=8)]:
        stranger_group = rng.choice([other for other in groups() if other != group and not overlapping(group, other)])
        stranger = rng.choice(groups()[stranger_group])
        words = [*rng.sample(members, k=3), stranger]
        rng.shuffle(words)
        said = f"{capitalised(named(stranger))} is the odd one out. The others are {plural_group(group)}."
        yield Record(rng.choice(asks), ", ".join(words), said)


def named_members(rng: Random) -> Iterator[Record]:
    asks = ["Name {count} {plural}.", "Give me {count} examples of {plural}.", "List {count} {plural}."]
    for group, members in groups().items():
        count, number = rng.choice([("two", 2), ("three", 3), ("four", 4)])
        listed = joined(rng.sample(members, k=number))
        yield Record(phrased(rng, asks, count=count, plural=plural_group(group)), "", f"{capitalised(listed)}.")


def jobs(rng: Random) -> Iterator[Record]:
    for job, work in rows(JOBS):
        if rng.random() < 0.5:
            yield Record(f"What does {with_article(job)} do?", "", f"{capitalised(with_article(job))} {work}.")
        else:
            yield Record(f"Who {work}?", "", f"{capitalised(with_article(job))} {work}.")


def uses(rng: Random) -> Iterator[Record]:
    for thing, use in rows(USES):
        are, verb = ("are", "are") if thing == "scales" else ("is", "is")
        ask = rng.choice([f"What {are} {thing} used for?", f"What do people use {thing} for?"])
        yield Record(ask, "", f"{capitalised(thing)} {verb} used {use}.")


def translations(rng: Random) -> Iterator[Record]:
    for english, *foreign in rows(TRANSLATIONS):
        for language, word in rng.sample(list(zip(("Spanish", "French", "German"), foreign, strict=True)), k=2):
            ask = rng.choice([f"How do you say '{english}' in {language}?", f"Translate '{english}' into {language}."])
            yield Record(ask, "", f"'{capitalised(english)}' in {language} is '{word}'.")


def blanks(rng: Random) -> Iterator[Record]:
    asks = ["Fill in the blank.", "Complete the sentence with one word.", "Fill in the missing word."]
    for sentence, word in rows(BLANKS):
        yield Record(rng.choice(asks), sentence, sentence.replace("___", word))
