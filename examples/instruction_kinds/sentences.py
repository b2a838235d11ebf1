"""Kinds that correct or reshape a sentence."""

from collections.abc import Iterator
from random import Random

from instruction_kinds.english import rows
from instruction_kinds.record import Record

MISSPELT = """
I recieved your letter yesterday. | I received your letter yesterday.
She is my best freind. | She is my best friend.
The wether is lovely today. | The weather is lovely today.
We went to the libary after school. | We went to the library after school.
He beleives every word she says. | He believes every word she says.
Tommorow we will visit the museum. | Tomorrow we will visit the museum.
The resturant opens at noon. | The restaurant opens at noon.
It was a beutiful morning. | It was a beautiful morning.
Please seperate the red cards from the blue ones. | Please separate the red cards from the blue ones.
My brother is definately coming. | My brother is definitely coming.
The goverment built a new bridge. | The government built a new bridge.
They live in a small vilage. | They live in a small village.
I allways drink tea in the morning. | I always drink tea in the morning.
The childrens played in the garden. | The children played in the garden.
Their is a cat on the roof. | There is a cat on the roof.
The dog wagged it's tail. | The dog wagged its tail.
Your late for dinner again. | You're late for dinner again.
She could of won the race. | She could have won the race.
He don't like cold soup. | He doesn't like cold soup.
We was very tired after the walk. | We were very tired after the walk.
I seen a fox near the barn. | I saw a fox near the barn.
She runned all the way home. | She ran all the way home.
There are three mouses in the box. | There are three mice in the box.
The alpacas is grazing on the hill. | The alpacas are grazing on the hill.
He is more taller than his father. | He is taller than his father.
I have a apple in my bag. | I have an apple in my bag.
Me and Tom went fishing. | Tom and I went fishing.
This book is more better than that one. | This book is better than that one.
My sister have two rabbits. | My sister has two rabbits.
The shop sells a lot of diffrent hats. | The shop sells a lot of different hats.
We ate breakfeast on the balcony. | We ate breakfast on the balcony.
The docter gave me some medicine. | The doctor gave me some medicine.
I forgot my umbrela on the bus. | I forgot my umbrella on the bus.
He writed a long letter to his uncle. | He wrote a long letter to his uncle.
Each of the boys have a ticket. | Each of the boys has a ticket.
"""

UNPUNCTUATED = """
where are you going | Where are you going?
my name is anna and i live in rome | My name is Anna and I live in Rome.
the train leaves at nine | The train leaves at nine.
we bought apples pears and plums | We bought apples, pears and plums.
what a lovely surprise | What a lovely surprise!
on monday we fly to paris | On Monday we fly to Paris.
did you feed the cat | Did you feed the cat?
please close the door | Please close the door.
my birthday is in july | My birthday is in July.
how old is your brother | How old is your brother?
i like coffee but my wife likes tea | I like coffee, but my wife likes tea.
mr green lives in london | Mr Green lives in London.
watch out | Watch out!
the river nile flows through egypt | The River Nile flows through Egypt.
can i borrow your pen | Can I borrow your pen?
it was raining so we stayed at home | It was raining, so we stayed at home.
alpacas hum when they are curious | Alpacas hum when they are curious.
who painted this picture | Who painted this picture?
dont forget your keys | Don't forget your keys.
i cant find my glasses | I can't find my glasses.
when does the shop open | When does the shop open?
yes i will come to the party | Yes, I will come to the party.
peter speaks german and spanish | Peter speaks German and Spanish.
its too late to call now | It's too late to call now.
we saw lions tigers and bears at the zoo | We saw lions, tigers and bears at the zoo.
happy birthday | Happy birthday!
"""

TO_QUESTIONS = """
She is at home. | Is she at home?
They are ready. | Are they ready?
He can swim. | Can he swim?
You like chocolate. | Do you like chocolate?
The shop opens at nine. | Does the shop open at nine?
Maria lives in Madrid. | Does Maria live in Madrid?
The children were asleep. | Were the children asleep?
He has finished his homework. | Has he finished his homework?
They will come tomorrow. | Will they come tomorrow?
The bus stops here. | Does the bus stop here?
She bought a new coat. | Did she buy a new coat?
You saw the film. | Did you see the film?
We should wait for Tom. | Should we wait for Tom?
The alpacas have eaten the hay. | Have the alpacas eaten the hay?
It rained last night. | Did it rain last night?
The soup is hot. | Is the soup hot?
Your brother plays the violin. | Does your brother play the violin?
The train was late. | Was the train late?
He would like some tea. | Would he like some tea?
There is milk in the fridge. | Is there milk in the fridge?
The cat caught a mouse. | Did the cat catch a mouse?
You have met my sister. | Have you met my sister?
Birds can see colours. | Can birds see colours?
The museum closes on Mondays. | Does the museum close on Mondays?
"""

TO_PASSIVE = """
The cat chased the mouse. | The mouse was chased by the cat.
Anna wrote the letter. | The letter was written by Anna.
The chef cooks the meal. | The meal is cooked by the chef.
The storm damaged the roof. | The roof was damaged by the storm.
The children ate the cake. | The cake was eaten by the children.
A famous artist painted this picture. | This picture was painted by a famous artist.
The dog bit the postman. | The postman was bitten by the dog.
The teacher praised the pupils. | The pupils were praised by the teacher.
The farmer shears the alpacas. | The alpacas are shorn by the farmer.
My father built this house. | This house was built by my father.
The wind broke two windows. | Two windows were broken by the wind.
The nurse helps the patients. | The patients are helped by the nurse.
The company makes toys. | Toys are made by the company.
The girl found the keys. | The keys were found by the girl.
A thief stole the bicycle. | The bicycle was stolen by a thief.
The mechanic repaired the car. | The car was repaired by the mechanic.
The judge will choose the winner. | The winner will be chosen by the judge.
The team won the match. | The match was won by the team.
The baker sells fresh bread. | Fresh bread is sold by the baker.
The river carried the boat. | The boat was carried by the river.
My aunt knitted these socks. | These socks were knitted by my aunt.
The sun melted the snow. | The snow was melted by the sun.
"""

TO_NEGATIVE = """
I like fish. | I do not like fish.
She is a doctor. | She is not a doctor.
They went home early. | They did not go home early.
He can drive. | He cannot drive.
We have a garden. | We do not have a garden.
The shop is open on Sundays. | The shop is not open on Sundays.
Tom reads the newspaper. | Tom does not read the newspaper.
It will snow tomorrow. | It will not snow tomorrow.
The boys were late. | The boys were not late.
You should wake the baby. | You should not wake the baby.
Llamas eat meat. | Llamas do not eat meat.
She found her ring. | She did not find her ring.
The soup tastes good. | The soup does not taste good.
I am hungry. | I am not hungry.
He has a brother. | He does not have a brother.
The lake freezes in winter. | The lake does not freeze in winter.
"""

TO_POLITE = """
Give me the salt. | Could you please pass me the salt?
Be quiet. | Could you please be a little quieter?
Move. | Excuse me, could you please let me through?
Send me the report today. | Could you please send me the report today?
I want a coffee. | I would like a coffee, please.
Open the window. | Would you mind opening the window, please?
You are wrong. | I am afraid I see it differently.
Wait here. | Would you please wait here for a moment?
Tell me the time. | Could you please tell me the time?
Help me with this box. | Could you please help me with this box?
Call me back. | Could you please call me back when you have a moment?
I don't want to come. | Thank you for asking, but I would rather not come.
Hurry up. | Could you please be as quick as you can?
Turn down the music. | Would you mind turning the music down a little, please?
Speak louder. | Could you please speak a little louder?
Don't park here. | I would be grateful if you did not park here.
Explain that again. | Could you please explain that once more?
Show me the way to the station. | Could you please show me the way to the station?
"""

COMBINED = """
The sun was shining. We went to the beach. | The sun was shining, so we went to the beach.
He was tired. He finished his work. | Although he was tired, he finished his work.
She opened the box. She found a ring. | She opened the box and found a ring.
I like tea. My brother likes coffee. | I like tea, but my brother likes coffee.
The bus was late. I missed the meeting. | I missed the meeting because the bus was late.
It started to rain. The children ran inside. | When it started to rain, the children ran inside.
The soup was too salty. Nobody ate it. | Nobody ate the soup because it was too salty.
Tom plays the piano. Tom plays the guitar. | Tom plays the piano and the guitar.
The man lives next door. He is a baker. | The man who lives next door is a baker.
I lost my key. I could not open the door. | I lost my key, so I could not open the door.
The film was long. We enjoyed it. | The film was long, but we enjoyed it.
We will eat. Then we will go for a walk. | After we eat, we will go for a walk.
The book is on the table. It is mine. | The book on the table is mine.
The alpaca was thirsty. It drank from the bucket. | The alpaca was thirsty, so it drank from the bucket.
The path was icy. She walked slowly. | She walked slowly because the path was icy.
He studied hard. He passed the exam. | He studied hard and passed the exam.
The dress is pretty. It is expensive. | The dress is pretty but expensive.
You can have an apple. You can have a pear. | You can have an apple or a pear.
The phone rang. I was asleep. | I was asleep when the phone rang.
She brushed her teeth. Then she went to bed. | She brushed her teeth before she went to bed.
The house is old. The house has thick walls. | The old house has thick walls.
The shop was closed. We went home. | The shop was closed, so we went home.
"""

ASKS = {
    MISSPELT: [
        "Correct the mistake in this sentence.",
        "Find and fix the error in the sentence.",
        "Rewrite the sentence without the mistake.",
    ],
    UNPUNCTUATED: [
        "Add capital letters and punctuation.",
        "Punctuate this sentence correctly.",
        "Write this sentence with correct capitals and punctuation.",
    ],
    TO_QUESTIONS: [
        "Turn this sentence into a question.",
        "Rewrite the statement as a question.",
        "Change the statement into a yes or no question.",
    ],
    TO_PASSIVE: ["Rewrite the sentence in the passive voice.", "Change this sentence from active to passive."],
    TO_NEGATIVE: ["Make this sentence negative.", "Rewrite this as a negative sentence."],
    TO_POLITE: [
        "Say this more politely.",
        "Rewrite this in a polite way.",
        "Make the following request or remark more polite.",
    ],
    COMBINED: ["Combine the two sentences into one.", "Join these sentences into a single sentence."],
}


def misspelt(rng: Random) -> Iterator[Record]:
    return rewritten(MISSPELT, rng=rng)


def unpunctuated(rng: Random) -> Iterator[Record]:
    return rewritten(UNPUNCTUATED, rng=rng)


def to_questions(rng: Random) -> Iterator[Record]:
    return rewritten(TO_QUESTIONS, rng=rng)


def to_passive(rng: Random) -> Iterator[Record]:
    return rewritten(TO_PASSIVE, rng=rng)


def to_negative(rng: Random) -> Iterator[Record]:
    return rewritten(TO_NEGATIVE, rng=rng)


def to_polite(rng: Random) -> Iterator[Record]:
    return rewritten(TO_POLITE, rng=rng)


def combined(rng: Random) -> Iterator[Record]:
    return rewritten(COMBINED, rng=rng)


def rewritten(table: str, *, rng: Random) -> Iterator[Record]:
    for before, after in rows(table):
        yield Record(rng.choice(ASKS[table]), before, after)
