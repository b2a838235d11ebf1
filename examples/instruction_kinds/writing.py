"""Kinds with a free answer: tips, messages, little stories, sentences about a word, summaries."""

from collections.abc import Iterator
from random import Random

from instruction_kinds.english import phrased, rows
from instruction_kinds.record import Record

# topic | three tips
TIPS = """
falling asleep | Go to bed at the same time every night. | Keep the room dark and quiet. | Put your phone away an hour before bed.
saving money | Write down what you spend. | Put some money aside on payday. | Compare prices before you buy.
saving water at home | Take short showers. | Turn off the tap while you brush your teeth. | Repair dripping taps.
saving electricity | Turn off lights when you leave a room. | Wash clothes in cool water. | Unplug chargers that you do not use.
learning a new language | Practise a little every day. | Listen to songs and stories. | Speak with other people as soon as you can.
preparing for an exam | Start early. | Make short notes of the main points. | Test yourself with old questions.
staying healthy | Eat plenty of fruit and vegetables. | Move every day. | Get enough sleep.
eating more vegetables | Add vegetables to soups and sauces. | Keep cut carrots ready as a snack. | Try one new vegetable every week.
making new friends | Join a club or a class. | Ask people about themselves. | Be kind and keep your promises.
giving a good talk | Know your main point. | Practise aloud. | Look at the audience and speak slowly.
writing a clear email | Put the main point first. | Use short sentences. | Read it once more before you send it.
packing a suitcase | Make a list. | Roll your clothes to save space. | Put heavy things at the bottom.
travelling by train | Book your ticket early. | Arrive ten minutes before the train leaves. | Bring water and a book.
keeping a house plant alive | Give it enough light. | Water it only when the soil feels dry. | Use a pot with a hole in the bottom.
growing tomatoes | Choose a sunny place. | Water the roots and not the leaves. | Tie the stems to a stick.
looking after a dog | Walk it every day. | Give it fresh water. | Take it to the vet once a year.
looking after a cat | Keep the litter box clean. | Play with it every day. | Give it a quiet place to sleep.
keeping alpacas | Keep at least three of them together. | Give them good grass and clean water. | Have them shorn once a year.
handling a shy alpaca | Move slowly and speak softly. | Do not touch its head. | Keep another alpaca in sight.
walking an alpaca on a lead | Fit the halter high on the nose. | Walk with a calm companion. | Keep the lead loose.
washing an alpaca jumper | Use cool water and a mild soap. | Do not wring it. | Dry it flat on a towel.
staying cool on a hot day | Drink plenty of water. | Stay in the shade at noon. | Wear light, loose clothes.
staying warm in winter | Wear several layers. | Cover your head and hands. | Keep moving.
cycling safely | Wear a helmet. | Use lights in the dark. | Give a clear sign before you turn.
driving in fog | Slow down. | Turn on the low lights. | Keep a long distance to the car in front.
hiking in the mountains | Check the weather. | Wear strong shoes. | Tell somebody where you are going.
reducing waste | Bring your own bag. | Repair things instead of throwing them away. | Buy only what you need.
choosing a good password | Make it long. | Do not use your name or birthday. | Use a different one for every account.
staying safe online | Do not open strange links. | Keep your programs up to date. | Never share your password.
working from home | Keep fixed hours. | Make a quiet place to work. | Take short breaks.
managing your time | Write a list of tasks. | Do the most important task first. | Leave some time free.
calming down when you are angry | Breathe slowly. | Count to ten. | Take a short walk before you speak.
reading more books | Always carry a book. | Read for ten minutes before bed. | Stop reading books that you do not enjoy.
cooking rice | Rinse it first. | Use about two cups of water for one cup of rice. | Keep the lid on while it cooks.
baking bread | Weigh the flour. | Knead the dough well. | Give it time to rise.
painting a room | Cover the floor. | Paint the ceiling first. | Use two thin coats of paint.
learning to knit | Start with thick yarn. | Practise one stitch until it is easy. | Make a scarf first.
being a good listener | Look at the person. | Do not interrupt. | Ask questions about what was said.
planning a birthday party | Choose a date early. | Make a list of guests. | Prepare some simple games.
moving to a new flat | Label every box. | Tell the post office your new address. | Pack the heavy books in small boxes.
"""

# request | answer, where / starts a new line
MESSAGES = """
Write a short message to a friend who is ill. | Hello Ben,/I was sorry to hear that you are ill. I hope you feel better soon. Let me know if I can bring you anything./Anna
Write a short email to ask for a day off. | Dear Ms Hill,/I would like to take a day off on Friday for a family matter. Please let me know if this is possible./Kind regards,/Tom
Write a thank-you note for a birthday present. | Dear Aunt Clara,/Thank you very much for the lovely book. I have already read half of it./Love,/Nina
Invite a friend to dinner on Saturday. | Hi Max,/Would you like to come to dinner on Saturday at seven? I am making soup and fresh bread./Julia
Write a message to say that you will be late. | Hi Sam, I am sorry, but my train is late. I will be there about twenty minutes after three.
Congratulate a friend on passing an exam. | Congratulations on passing your exam, Leo! You worked hard for it, and I am very happy for you.
Write a polite email to ask about the price of a room. | Dear Sir or Madam,/Could you please tell me the price of a double room for two nights in May?/Kind regards,/Paula Stone
Write an apology to a neighbour for loud music. | Dear Mr Berg,/I am sorry about the loud music last night. It will not happen again./Your neighbour,/Oscar
Wish a colleague a good holiday. | Have a wonderful holiday, Marta! Rest well and come back with good stories.
Write a short note to the postman about a parcel. | Dear postman,/Please leave the parcel with my neighbour at number 12. Thank you very much./Eva Moore
Write an email to cancel an appointment. | Dear Dr Young,/I am sorry, but I cannot come on Tuesday. Could I have another appointment next week?/Kind regards,/Simon Weber
Write a message to remind a friend of a meeting. | Hi Grace, just a short reminder that we meet tomorrow at ten in the library. See you there!
Write a short message to welcome a new neighbour. | Welcome to our street! If you need anything, please ring our bell. We live at number 5./The Jensen family
Ask a colleague for help with a report. | Hi Daniel, could you please look at my report this afternoon? I am not sure about the last page.
Write a message to a shop about a broken lamp. | Hello,/The lamp that I bought last week does not work. May I exchange it for a new one?/Kind regards,/Ruth Taylor
Write a short message to a vet about an alpaca that is not eating. | Dear Dr Moore,/One of my alpacas has not eaten since yesterday and lies apart from the herd. Could you please come today?/Adam Hill
Write a note for the fridge. | Please buy milk, eggs and bread. I will be home at six.
Ask a librarian whether a book can be reserved. | Hello, could you please reserve the new book about bridges for me? My name is Nora Klein.
Write a message to say goodbye to a colleague. | Dear Peter,/Thank you for five good years. We will miss you and your jokes. All the best for your new job!
Write a short advertisement for a used bicycle. | For sale: a red bicycle in good condition, with lights and a basket. The price is 80 dollars.
Write a short advertisement for alpaca socks. | Cold feet? Our alpaca socks are soft, warm and light. Try a pair this winter!
Write a sign for a shop that is closed for a holiday. | We are closed from Monday to Friday. We look forward to seeing you again on Saturday.
Write a short poem about rain. | Soft rain falls on roof and tree,/It hums a quiet song to me./It fills the pond, it wets the lane,/And then the sun comes out again.
Write a short poem about an alpaca. | An alpaca stood on a hill in the sun,/And hummed to the others when day was done./They folded their legs and lay down to rest,/In the coats that they wore, the warmest and best.
Write two lines about the moon. | The moon climbs over the sleeping town,/And pours its silver softly down.
Write two lines about spring. | The snow is gone, the days grow long,/And every bush is full of song.
Write a short wish for a birthday card. | Happy birthday! May your new year be full of health, good friends and happy days.
Write a short wish for the new year. | I wish you a happy and healthy new year with many good surprises.
Describe a beach in two sentences. | The sand is warm and yellow, and small waves roll in from the sea. Children build castles while gulls cry overhead.
Describe a forest in two sentences. | Tall trees stand close together, and the ground is soft with moss. It is quiet, except for a bird that sings far away.
Describe a busy market in two sentences. | Sellers call out their prices, and people push past with full bags. The air smells of fruit, fish and fresh bread.
Describe an alpaca in two sentences. | An alpaca has a long neck, large dark eyes and a thick, soft fleece. It walks quietly on two-toed feet and hums to its friends.
Describe your ideal breakfast in two sentences. | I do not eat, but many people enjoy fresh bread with butter and jam. A cup of tea or coffee goes well with it.
Tell me a very short story about a dog. | A dog found a glove in the snow and carried it through the village. At the last house a girl opened the door, laughed and held up the other glove.
Tell me a very short story about a lost key. | Mr Novak looked for his key all morning. In the evening he found it in the lock, where he had left it the night before.
Tell me a very short story about an alpaca. | A young alpaca was afraid of the dark barn. One night its mother hummed at the door until it came in, and since then it has always gone in first.
Tell me a very short story about a boat. | Two sisters built a boat from an old table. It sank after a minute, but they laughed so much that they built another one the next day.
Tell me a very short story about a teacher. | A teacher asked her class to bring the most useful thing they had. One boy brought his grandmother, and nobody could disagree.
Tell me a joke about alpacas. | What do you call a group of singing alpacas? A humming choir!
Tell me a joke about a book. | Why was the maths book sad? It had too many problems.
"""

SENTENCES = """
river | The boys swam in the cold river.
happy | She was happy when her sister called.
bread | The baker sells fresh bread every morning.
window | Please close the window before it rains.
quickly | He quickly put on his coat and left.
garden | My grandmother grows roses in her garden.
alpaca | The alpaca hummed softly to its cria.
friend | My best friend lives across the street.
winter | In winter the lake is covered with ice.
music | They danced to the music all night.
careful | Be careful on the icy steps.
letter | I found an old letter in the drawer.
mountain | We could see the mountain from our hotel.
forget | Do not forget to feed the cat.
because | We stayed at home because it was raining.
although | Although he was tired, he went for a run.
borrow | May I borrow your pencil for a moment?
tomorrow | Tomorrow we will visit the castle.
kitchen | The kitchen smells of warm cake.
brave | The brave girl jumped into the water to save the dog.
station | The train stopped at a small station.
never | I have never seen such a big fish.
teacher | Our teacher told us a funny story.
silence | There was silence in the hall after the last note.
umbrella | Take an umbrella, because dark clouds are coming.
promise | I promise that I will write to you.
fleece | The fleece of the suri is long and silky.
bridge | An old stone bridge crosses the stream.
holiday | We spent our holiday by the sea.
curious | The curious kitten climbed into the bag.
market | On Fridays we buy cheese at the market.
early | She gets up early to see the sunrise.
"""

SUMMARIES = """
The town library was closed for a year because the roof leaked. Builders have now put on a new roof. The library opens again on Monday. | After a year of work on its roof, the town library opens again on Monday.
Maria wanted to learn the guitar. She practised every evening for six months. Last week she played her first concert. | After six months of practice, Maria played her first guitar concert.
The bus company will add two buses in the morning. Many people had complained that the buses were too full. | The bus company will add two morning buses because the old ones were too full.
Peter left his bag on the train. A woman found it and called the number inside. Peter had his bag back the same evening. | A woman found the bag that Peter had left on the train and returned it the same day.
It did not rain for two months. The river became very low. The town asked people to use less water. | After two dry months, the town asked people to save water.
The museum has a new show about ships. Children can build a small boat there. The show runs until May. | Until May, the museum has a show about ships where children can build a small boat.
Our school planted fifty trees last autumn. Most of them have grown well. Next year the pupils will plant fifty more. | Our school planted fifty trees last autumn and will plant fifty more next year.
The farmer heard the alarm call of her alpacas at night. She went out with a lamp. A fox was running away from the hens. | The alarm call of the alpacas warned the farmer of a fox near the hens.
The old bakery closed in March. Two young bakers have rented the shop. They will sell bread and coffee from June. | Two young bakers will open a shop with bread and coffee in the old bakery in June.
Tom wanted to bake a cake. He had no eggs. His neighbour gave him three. | A neighbour gave Tom the eggs that he needed for his cake.
The swimming pool is open from eight to six. On Sundays it closes at four. It is closed on Mondays. | The pool is open from eight to six, closes at four on Sundays and is closed on Mondays.
Anna moved to Oslo for a new job. At first she felt lonely. Then she joined a choir and made many friends. | Anna was lonely in Oslo at first, but she made friends in a choir.
A strong storm hit the coast on Tuesday. Trees fell on the road. Nobody was hurt. | A storm on Tuesday brought down trees on the coast, but nobody was hurt.
The alpacas were shorn on Saturday. The fleece was dry and clean. The mill will turn it into yarn this summer. | The clean fleece that was shorn on Saturday will become yarn this summer.
The team lost its first three games. Then a new coach arrived. Since then the team has won every game. | The team lost at first, but it has won every game since a new coach arrived.
The phone is light and looks good. Its battery lasts only half a day. I would not buy it again. | The phone looks good, but its weak battery makes it a poor choice.
Grandfather keeps bees behind his house. Last year they gave him thirty jars of honey. He gave most of them to friends. | Grandfather's bees gave him thirty jars of honey, and he gave most of them away.
The city wants to build a new park. Some people fear that it will cost too much. The council will decide in April. | The council will decide in April on a new park that some people find too expensive.
Lena takes the train to work. It takes forty minutes. She uses the time to read. | Lena reads during her forty-minute train ride to work.
The hotel was full. The travellers knocked at a farmhouse. The farmer let them sleep in the barn. | Because the hotel was full, the travellers slept in a farmer's barn.
Penguins live in cold places. They have thick fat and tight feathers. These keep them warm in the water. | Thick fat and tight feathers keep penguins warm in cold water.
Many people throw away old bread. It can be turned into crumbs, soup or pudding. This saves money. | Old bread should not be thrown away, because using it for crumbs, soup or pudding saves money.
The first bridge was made of wood. It burned down in 1850. The town then built one of stone. | After the wooden bridge burned down in 1850, the town built one of stone.
Sam forgot his umbrella. It began to rain on his way home. He arrived wet and cold. | Sam came home wet and cold because he had forgotten his umbrella.
"""


def tips(rng: Random) -> Iterator[Record]:
    asks = [
        "Give three tips for {topic}.",
        "Give me three tips for {topic}.",
        "List three pieces of advice for {topic}.",
    ]
    for topic, *three in rows(TIPS):
        numbered = "\n".join(f"{i}. {tip}" for i, tip in enumerate(three, 1))
        yield Record(phrased(rng, asks, topic=topic), "", numbered)


def messages(rng: Random) -> Iterator[Record]:
    for ask, said in rows(MESSAGES):
        yield Record(ask, "", said.replace("/", "\n"))


def sentences_with(rng: Random) -> Iterator[Record]:
    asks = [
        "Write a sentence with the word '{word}'.",
        "Use the word '{word}' in a sentence.",
        "Make a sentence that contains '{word}'.",
    ]
    for word, said in rows(SENTENCES):
        yield Record(phrased(rng, asks, word=word), "", said)


def summaries(rng: Random) -> Iterator[Record]:
    asks = ["Summarise the text in one sentence.", "Write a one-sentence summary.", "Say this in one sentence."]
    for text, said in rows(SUMMARIES):
        yield Record(rng.choice(asks), text, said)
