"""Kinds about single words: meaning, form, rhyme and part of speech."""

from collections.abc import Iterator
from random import Random

from instruction_kinds.english import capitalised, joined, phrased, rows, with_article
from instruction_kinds.record import Record

ANTONYMS = """
hot | cold
big | small
fast | slow
early | late
happy | sad
open | closed
full | empty
heavy | light
hard | soft
loud | quiet
rich | poor
strong | weak
young | old
clean | dirty
dry | wet
dark | bright
deep | shallow
wide | narrow
thick | thin
brave | cowardly
polite | rude
cheap | expensive
easy | difficult
safe | dangerous
sharp | blunt
smooth | rough
tight | loose
true | false
victory | defeat
arrive | leave
begin | end
buy | sell
remember | forget
laugh | cry
love | hate
push | pull
rise | fall
lend | borrow
ancient | modern
generous | stingy
visible | invisible
success | failure
inside | outside
always | never
above | below
"""

SYNONYMS = """
happy | joyful
big | large
small | tiny
fast | quick
smart | clever
angry | furious
tired | weary
begin | start
end | finish
help | assist
buy | purchase
answer | reply
gift | present
scared | afraid
brave | courageous
beautiful | lovely
difficult | hard
funny | amusing
rich | wealthy
silent | quiet
strange | odd
correct | right
error | mistake
journey | trip
shout | yell
choose | pick
repair | mend
hide | conceal
ill | sick
calm | peaceful
huge | enormous
sad | unhappy
see | notice
speak | talk
close | shut
job | occupation
street | road
child | kid
simple | easy
wet | damp
"""

PLURALS = """
cat | cats
box | boxes
baby | babies
child | children
mouse | mice
leaf | leaves
foot | feet
tooth | teeth
goose | geese
man | men
woman | women
knife | knives
city | cities
bus | buses
dish | dishes
watch | watches
potato | potatoes
tomato | tomatoes
wolf | wolves
sheep | sheep
fish | fish
deer | deer
ox | oxen
person | people
photo | photos
piano | pianos
key | keys
monkey | monkeys
story | stories
life | lives
shelf | shelves
half | halves
thief | thieves
brush | brushes
glass | glasses
lady | ladies
country | countries
hero | heroes
loaf | loaves
alpaca | alpacas
llama | llamas
roof | roofs
penny | pennies
church | churches
"""

PAST_TENSES = """
go | went
eat | ate
see | saw
buy | bought
take | took
write | wrote
run | ran
swim | swam
drink | drank
give | gave
come | came
make | made
think | thought
teach | taught
catch | caught
bring | brought
fly | flew
grow | grew
know | knew
sing | sang
sleep | slept
keep | kept
leave | left
lose | lost
find | found
tell | told
break | broke
speak | spoke
drive | drove
ride | rode
win | won
begin | began
build | built
walk | walked
carry | carried
stop | stopped
play | played
hum | hummed
choose | chose
wear | wore
draw | drew
feel | felt
"""

TENSE_SENTENCES = """
She walks to school. | She walked to school.
He eats an apple. | He ate an apple.
We play football in the park. | We played football in the park.
They go to the beach. | They went to the beach.
I write a letter to my aunt. | I wrote a letter to my aunt.
The dog runs after the ball. | The dog ran after the ball.
My mother bakes a cake. | My mother baked a cake.
The boy sings a song. | The boy sang a song.
The train leaves at noon. | The train left at noon.
The alpaca hums to its cria. | The alpaca hummed to its cria.
I drink a glass of milk. | I drank a glass of milk.
The teacher speaks slowly. | The teacher spoke slowly.
We are at home. | We were at home.
It is cold outside. | It was cold outside.
The birds fly to the south. | The birds flew to the south.
He catches the bus. | He caught the bus.
"""

RHYMES = """
cat | hat, bat, mat
tree | bee, sea, free
light | night, kite, bright
day | play, say, way
moon | soon, spoon, tune
king | ring, sing, wing
ball | tall, fall, wall
cake | lake, snake, make
star | car, far, jar
dog | fog, log, frog
rain | train, plane, chain
boat | goat, coat, note
bed | red, head, bread
fish | dish, wish
book | cook, look, hook
hair | bear, chair, fair
snow | go, slow, grow
sand | hand, land, band
bell | well, shell, tell
mice | rice, ice, nice
sky | fly, high, pie
ten | hen, pen, men
duck | truck, luck, stuck
sun | run, fun, bun
door | floor, four, more
nose | rose, toes, goes
time | climb, lime, rhyme
"""

PARTS_OF_SPEECH = """
table | noun
run | verb
beautiful | adjective
slowly | adverb
happiness | noun
sing | verb
tall | adjective
quickly | adverb
she | pronoun
under | preposition
and | conjunction
teacher | noun
bring | verb
clever | adjective
often | adverb
they | pronoun
river | noun
between | preposition
hungry | adjective
carefully | adverb
write | verb
because | conjunction
kitchen | noun
noisy | adjective
believe | verb
"""


def antonyms(rng: Random) -> Iterator[Record]:
    exchanges = [
        ("What is the opposite of '{word}'?", "The opposite of '{word}' is '{other}'."),
        ("Give an antonym of '{word}'.", "An antonym of '{word}' is '{other}'."),
        ("Name a word that means the opposite of '{word}'.", "{Other}."),
    ]
    return paired(ANTONYMS, exchanges, rng=rng)


def synonyms(rng: Random) -> Iterator[Record]:
    exchanges = [
        ("Give a synonym of '{word}'.", "A synonym of '{word}' is '{other}'."),
        ("What is another word for '{word}'?", "Another word for '{word}' is '{other}'."),
        ("Find a word that means the same as '{word}'.", "{Other}."),
    ]
    return paired(SYNONYMS, exchanges, rng=rng)


def paired(table: str, exchanges: list[tuple[str, str]], *, rng: Random) -> Iterator[Record]:
    for word, other in rows(table):
        ask, said = rng.choice(exchanges)
        fields = {"word": word, "other": other, "Other": capitalised(other)}
        yield Record(ask.format(**fields), "", said.format(**fields))


def plurals(rng: Random) -> Iterator[Record]:
    asks = ["What is the plural of '{word}'?", "Write the plural form of the word '{word}'.", "One {word}, two what?"]
    for word, other in rows(PLURALS):
        ask = rng.choice(asks)
        said = f"Two {other}." if ask.startswith("One") else f"The plural of '{word}' is '{other}'."
        yield Record(ask.format(word=word), "", said)


def past_tenses(rng: Random) -> Iterator[Record]:
    asks = [
        "What is the past tense of '{word}'?",
        "Give the past tense of the verb '{word}'.",
        "Put the verb '{word}' in the past tense.",
    ]
    for word, other in rows(PAST_TENSES):
        said = phrased(
            rng,
            ["The past tense of '{word}' is '{other}'.", "{Other}."],
            word=word,
            other=other,
            Other=capitalised(other),
        )
        yield Record(phrased(rng, asks, word=word), "", said)
    asks = ["Rewrite the sentence in the past tense.", "Put this sentence into the past tense."]
    for present, past in rows(TENSE_SENTENCES):
        yield Record(rng.choice(asks), present, past)


def rhymes(rng: Random) -> Iterator[Record]:
    one = ["Name a word that rhymes with '{word}'.", "What rhymes with '{word}'?"]
    for word, others in rows(RHYMES):
        found = others.split(", ")
        if rng.random() < 0.5:
            other = rng.choice(found)
            yield Record(phrased(rng, one, word=word), "", f"'{capitalised(other)}' rhymes with '{word}'.")
        else:
            ask = f"List {'two' if len(found) == 2 else 'three'} words that rhyme with '{word}'."
            yield Record(ask, "", f"{capitalised(joined(found))}.")


def parts_of_speech(rng: Random) -> Iterator[Record]:
    asks = ["What part of speech is '{word}'?", "Is the word '{word}' {options}?"]
    for word, part in rows(PARTS_OF_SPEECH):
        others = [other for other in ("noun", "verb", "adjective", "adverb") if other != part]
        options = [part, *rng.sample(others, k=2)]
        rng.shuffle(options)
        listed = joined([with_article(option) for option in options], last="or")
        ask = phrased(rng, asks, word=word, options=listed)
        yield Record(ask, "", f"The word '{word}' is {with_article(part)}.")
