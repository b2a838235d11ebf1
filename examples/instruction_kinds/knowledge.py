"""Kinds whose answers are written by hand: definitions, explanations, comparisons, true or false."""

from collections.abc import Iterator
from random import Random

from instruction_kinds.english import phrased, rows
from instruction_kinds.record import Record

DEFINITIONS = """
a bridge | A bridge is a structure that carries a road or a path over a river, a valley or another road.
an island | An island is a piece of land with water all around it.
a desert | A desert is a dry region where very little rain falls.
a volcano | A volcano is an opening in the ground through which hot melted rock, ash and gas can escape.
a glacier | A glacier is a large mass of ice that moves slowly over land.
a valley | A valley is low land between hills or mountains.
a harbour | A harbour is a sheltered place on the coast where ships can stay safely.
a library | A library is a place where people can read and borrow books.
a museum | A museum is a building where interesting and valuable things are kept and shown.
a hospital | A hospital is a place where people who are ill or hurt are treated.
a pharmacy | A pharmacy is a shop that sells medicines.
a bakery | A bakery is a place where bread and cakes are made and sold.
an orchard | An orchard is a piece of land where fruit trees are grown.
a recipe | A recipe is a list of ingredients and steps for cooking something.
a budget | A budget is a plan for how much money to spend and on what.
a password | A password is a secret word that proves you are allowed to use something.
a keyboard | A keyboard is a set of keys that you press to type or to play music.
a computer | A computer is a machine that stores and works with information.
a search engine | A search engine is a program that finds pages on the internet that match your words.
an email | An email is a message sent from one computer or phone to another.
a language model | A language model is a program that has learned from text to predict which words come next.
a robot | A robot is a machine that can do tasks by itself.
a battery | A battery is a device that stores energy and gives it out as electricity.
a magnet | A magnet is an object that attracts iron.
a planet | A planet is a large round body that moves around a star.
a star | A star is a huge ball of hot gas that gives off its own light.
a comet | A comet is a body of ice and dust that travels around the Sun and grows a tail when it comes near.
a mammal | A mammal is a warm-blooded animal that feeds its young with milk.
a reptile | A reptile is an animal with scaly skin, such as a snake or a lizard.
an insect | An insect is a small animal with six legs and a body in three parts.
a seed | A seed is the part of a plant from which a new plant can grow.
a herb | A herb is a plant whose leaves are used to flavour food or as medicine.
a fossil | A fossil is what is left of a plant or an animal that lived very long ago, kept in rock.
a triangle | A triangle is a flat shape with three straight sides.
a circle | A circle is a round flat shape whose edge is everywhere the same distance from the centre.
a square | A square is a flat shape with four equal sides and four right angles.
a fraction | A fraction is a part of a whole, such as one half or three quarters.
a noun | A noun is a word that names a person, a place, a thing or an idea.
a verb | A verb is a word that says what somebody does or what happens.
an adjective | An adjective is a word that describes a noun.
a proverb | A proverb is a short, well-known saying that gives advice.
a poem | A poem is a piece of writing in which the words are chosen for their sound and rhythm as well as their meaning.
a novel | A novel is a long story, written in prose, about imaginary people and events.
an orchestra | An orchestra is a large group of musicians who play together on different instruments.
a sculpture | A sculpture is a work of art with a solid shape, made by carving or moulding.
a passport | A passport is a document that shows who you are and lets you travel to other countries.
a neighbour | A neighbour is a person who lives next to you or near you.
a guest | A guest is a person who has been invited to your home or who stays at a hotel.
an orphan | An orphan is a child whose parents have died.
a hobby | A hobby is something that you enjoy doing in your free time.
a deadline | A deadline is the latest time by which something must be finished.
a vaccine | A vaccine is a substance that helps the body to protect itself against a disease.
a thermometer | A thermometer is an instrument that measures temperature.
a fleece | A fleece is the coat of wool or fibre of an animal such as a sheep or an alpaca.
a spindle | A spindle is a stick that is turned to twist fibre into yarn.
a scarf | A scarf is a long piece of cloth worn around the neck.
a lighthouse | A lighthouse is a tower with a strong light that guides ships.
a greenhouse | A greenhouse is a glass building in which plants are kept warm.
a tunnel | A tunnel is a long passage under the ground or through a hill.
an election | An election is a vote in which people choose their leaders.
"""

EXPLANATIONS = """
why the sky is blue | The sky is blue because the air scatters blue light from the Sun more than red light.
why leaves are green | Leaves are green because they hold chlorophyll, a green substance that helps plants to use sunlight.
why we sleep | We sleep so that the body can rest and repair itself and the brain can sort what it has learned.
why we have seasons | We have seasons because the Earth is tilted as it travels around the Sun.
why ice floats on water | Ice floats because it is less dense than liquid water.
why the sea is salty | The sea is salty because rivers carry salts from the rocks into it, and the salts stay when the water evaporates.
why birds migrate | Birds migrate to find more food and better places to raise their young.
why we should drink water | We should drink water because the body needs it to carry food, to keep cool and to work properly.
why we brush our teeth | We brush our teeth to remove the food and germs that cause holes in them.
why iron rusts | Iron rusts because it reacts with oxygen and water.
why exercise is good for us | Exercise is good for us because it strengthens the heart and muscles and lifts the mood.
why bees are important | Bees are important because they pollinate many plants, including plants that we eat.
why some animals sleep through the winter | Some animals sleep through the winter to save energy when food is scarce.
why we wear seat belts | We wear seat belts because they hold us in place and prevent injuries in a crash.
why people save money | People save money so that they can pay for large things later and for costs that come as a surprise.
why alpacas hum | Alpacas hum to keep in touch with each other and to show how they feel.
why alpacas are shorn | Alpacas are shorn so that they do not overheat in summer and because their fibre is useful.
why bread rises | Bread rises because yeast makes bubbles of gas in the dough.
why the moon shines | The Moon shines because it reflects the light of the Sun.
why metal feels cold | Metal feels cold because it carries heat away from the hand quickly.
why we cook meat | We cook meat to kill germs and to make it easier to eat.
why recycling is useful | Recycling is useful because it saves raw materials and reduces waste.
why onions make us cry | Onions make us cry because cutting them sets free a gas that irritates the eyes.
why soap cleans | Soap cleans because it sticks to both grease and water, so the water can wash the grease away.
why deserts are cold at night | Deserts are cold at night because dry air and clear skies let the heat of the day escape.
how a rainbow forms | A rainbow forms when sunlight is bent and split into colours by drops of rain.
how plants make food | Plants make food from water, carbon dioxide and sunlight in a process called photosynthesis.
how rain forms | Rain forms when water vapour in the air cools, turns into drops and falls from the clouds.
how a plane stays in the air | A plane stays in the air because its moving wings push air downwards, and the air pushes the wings up.
how fish breathe | Fish breathe by taking oxygen from the water through their gills.
how a caterpillar becomes a butterfly | A caterpillar forms a hard case around itself, changes its shape inside and comes out as a butterfly.
how honey is made | Bees collect nectar from flowers, thicken it in the hive and store it as honey.
how cheese is made | Cheese is made by curdling milk, removing the liquid and pressing what is left.
how paper is made | Paper is made by turning wood into a wet pulp, pressing it flat and drying it.
how a thermos keeps tea hot | A thermos keeps tea hot because the empty space in its wall lets hardly any heat through.
how vaccines work | A vaccine shows the body a harmless form of a germ, so that the body learns to fight the real one.
how a sailing boat moves | A sailing boat moves because the wind pushes against its sails.
how yarn is made | Yarn is made by cleaning fibre, laying it in one direction and twisting it.
how a computer learns from examples | A computer learns from examples by changing its numbers little by little until its answers are right more often.
how a search engine finds pages | A search engine keeps a large index of words and looks up which pages match your question best.
what gravity is | Gravity is the force that pulls things towards each other, and it is why things fall to the ground.
what evaporation is | Evaporation is the change of a liquid into a gas.
what an ecosystem is | An ecosystem is all the living things in a place together with the water, air and soil around them.
what democracy is | Democracy is a form of government in which the people choose their leaders by voting.
what a habit is | A habit is something that you do so often that you hardly think about it.
what friendship means | Friendship means that two people like, trust and help each other.
what inflation is | Inflation is a general rise in prices, which means that money buys less than before.
what electricity is | Electricity is a form of energy that comes from moving electric charges.
what machine learning is | Machine learning is a way of building programs that learn from data instead of following fixed rules.
what fine-tuning a model means | Fine-tuning means training a model a little more on examples of the task it should do.
what an eclipse of the Sun is | An eclipse of the Sun happens when the Moon passes between the Sun and the Earth.
what the water cycle is | The water cycle is the movement of water from the sea to the air, down to the land as rain and back to the sea.
what photosynthesis is | Photosynthesis is the way in which plants use sunlight to turn water and carbon dioxide into sugar and oxygen.
what pollution is | Pollution is harmful matter that gets into the air, the water or the soil.
what a balanced diet is | A balanced diet is a mix of foods that gives the body all that it needs, in the right amounts.
what the equator is | The equator is an imaginary line around the middle of the Earth, halfway between the poles.
what patience is | Patience is the ability to wait or to go on with something difficult without becoming angry.
what a leap year is | A leap year is a year with 366 days, in which February has 29 days.
what an allergy is | An allergy is a strong reaction of the body to something that is harmless to most people.
what crop rotation is | Crop rotation means growing different crops in the same field in turn, so that the soil stays healthy.
"""

COMPARISONS = """
a lake and a river | A lake is still water with land around it, while a river flows towards the sea or a lake.
a cat and a dog | Cats like to be independent and meow, while dogs enjoy company and bark.
tea and coffee | Tea is made from leaves, while coffee is made from roasted beans.
butter and margarine | Butter is made from cream, while margarine is made mostly from vegetable oil.
a village and a city | A village is small and has few people, while a city is large and has many.
summer and winter | Summer is warm with long days, while winter is cold with short days.
a moth and a butterfly | Most moths fly at night and most butterflies fly by day, and butterflies usually have thinner feelers with a knob at the end.
a frog and a toad | Frogs have smooth, moist skin, while toads have dry, bumpy skin.
an alpaca and a llama | An alpaca is smaller and is kept for its fibre, while a llama is larger and can carry loads.
huacaya and suri alpacas | Huacayas have a dense, springy fleece with crimp, while suris have long, silky locks without crimp.
a novel and a short story | A novel is long and often has many characters, while a short story can be read in one sitting.
a violin and a cello | A violin is small and is held under the chin, while a cello is large and stands on the floor.
a bicycle and a motorbike | A bicycle is moved by the legs of the rider, while a motorbike has an engine.
a fruit and a vegetable | A fruit grows from a flower and holds seeds, while a vegetable is another part of a plant, such as a root or a leaf.
a planet and a star | A star makes its own light, while a planet only reflects light.
an oven and a stove | An oven heats food inside a closed space, while a stove heats pots and pans from below.
a doctor and a nurse | A doctor finds out what is wrong and plans the treatment, while a nurse cares for the patients day by day.
the Sun and the Moon | The Sun is a star that gives off light, while the Moon goes around the Earth and reflects sunlight.
a crocodile and an alligator | A crocodile has a narrow, pointed snout, while an alligator has a broad, round one.
a turtle and a tortoise | Most turtles live in water, while tortoises live on land.
wool and cotton | Wool comes from animals such as sheep, while cotton comes from a plant.
a hotel and a campsite | At a hotel you sleep in a room, while at a campsite you usually sleep in a tent.
a bus and a tram | A bus drives freely on the road, while a tram runs on rails.
an email and a letter | An email arrives in seconds, while a letter is written on paper and takes days.
a hill and a mountain | A mountain is higher and usually steeper than a hill.
rain and snow | Rain is liquid water, while snow falls as ice crystals.
a noun and a verb | A noun names a thing, while a verb says what happens.
a king and a president | A king usually inherits his position, while a president is usually elected.
carding and combing | Carding mixes the fibres into a soft, airy roll, while combing lays them side by side and removes the short ones.
hay and straw | Hay is dried grass used as food, while straw is the dry stalks of grain used mostly as bedding.
"""

# statement | True or False, with the reason
TRUE_OR_FALSE = """
The Earth is flat. | False. The Earth is round.
Water boils at 100 degrees Celsius at sea level. | True.
Spiders have six legs. | False. Spiders have eight legs.
Whales are fish. | False. Whales are mammals.
The Sun is a star. | True.
Paris is the capital of Italy. | False. Rome is the capital of Italy.
Penguins can fly. | False. Penguins are birds, but they cannot fly.
An octopus has eight arms. | True.
There are 100 minutes in an hour. | False. There are 60 minutes in an hour.
Bats are mammals. | True.
Alpacas lay eggs. | False. Alpacas give birth to live young.
Alpacas come from South America. | True.
Gold is a metal. | True.
A square has five sides. | False. A square has four sides.
Mount Everest is the highest mountain above sea level. | True.
The Pacific is the largest ocean. | True.
Tomatoes grow under the ground. | False. Tomatoes grow above the ground on a plant.
Carrots are roots. | True.
The Moon is larger than the Earth. | False. The Moon is smaller than the Earth.
Humans have two lungs. | True.
Diamonds are made of carbon. | True.
Sound travels faster than light. | False. Light travels much faster than sound.
Fish breathe with gills. | True.
All deserts are hot. | False. Some deserts, such as the Gobi, are very cold in winter.
The heart pumps blood through the body. | True.
Brazil is in Africa. | False. Brazil is in South America.
Snakes have legs. | False. Snakes have no legs.
Plants need light to grow. | True.
"""

TRIVIA = """
How many legs does an insect have? | An insect has six legs.
How many legs does a spider have? | A spider has eight legs.
Which planet is closest to the Sun? | Mercury is the planet closest to the Sun.
Which planet is the largest in the solar system? | Jupiter is the largest planet in the solar system.
What is the largest ocean on Earth? | The Pacific is the largest ocean on Earth.
What is the highest mountain on Earth? | Mount Everest is the highest mountain above sea level.
What is the largest animal on Earth? | The blue whale is the largest animal on Earth.
What is the fastest land animal? | The cheetah is the fastest land animal.
What is the tallest animal? | The giraffe is the tallest animal.
Who wrote Romeo and Juliet? | William Shakespeare wrote Romeo and Juliet.
Who painted the Mona Lisa? | Leonardo da Vinci painted the Mona Lisa.
Who was the first person on the Moon? | Neil Armstrong was the first person on the Moon.
In which year did people first land on the Moon? | People first landed on the Moon in 1969.
How many continents are there? | There are seven continents in the usual count.
How many letters are in the English alphabet? | There are 26 letters in the English alphabet.
What are the vowels in English? | The vowels are a, e, i, o and u.
What are the four seasons? | The four seasons are spring, summer, autumn and winter.
What are the five senses? | The five senses are sight, hearing, smell, taste and touch.
What are the primary colours of paint? | The primary colours of paint are red, yellow and blue.
Which colour do you get when you mix blue and yellow paint? | You get green.
Which colour do you get when you mix red and white paint? | You get pink.
Which colour do you get when you mix red and yellow paint? | You get orange.
What is water made of? | Water is made of hydrogen and oxygen.
What do we breathe in that keeps us alive? | We breathe in oxygen.
Which organ pumps blood through the body? | The heart pumps blood through the body.
How many bones does an adult human have? | An adult human usually has 206 bones.
How many players of one team are on the field in football? | Eleven players of each team are on the field.
How many strings does a violin have? | A violin has four strings.
How many keys does a standard piano have? | A standard piano has 88 keys.
At what temperature does water freeze? | Water freezes at 0 degrees Celsius.
Which language is spoken in Brazil? | Portuguese is spoken in Brazil.
Which language is spoken in Austria? | German is spoken in Austria.
In which country are the pyramids of Giza? | The pyramids of Giza are in Egypt.
In which city is the Eiffel Tower? | The Eiffel Tower is in Paris.
In which mountains do most alpacas live? | Most alpacas live in the Andes.
What do pandas eat? | Pandas eat mostly bamboo.
What do alpacas eat? | Alpacas eat mostly grass and hay.
Which animal gives us honey? | The bee gives us honey.
What is wine made from? | Wine is made from grapes.
What is flour made from? | Flour is usually made from wheat or another grain.
"""


def definitions(rng: Random) -> Iterator[Record]:
    asks = ["What is {thing}?", "Define '{bare}'.", "Explain what {thing} is.", "Give a short definition of '{bare}'."]
    for thing, said in rows(DEFINITIONS):
        yield Record(phrased(rng, asks, thing=thing, bare=thing.split(" ", 1)[1]), "", said)


def explanations(rng: Random) -> Iterator[Record]:
    asks = [
        "Explain in one sentence {what}.",
        "Tell me briefly {what}.",
        "In one sentence, explain {what}.",
        "Can you explain {what}?",
    ]
    for what, said in rows(EXPLANATIONS):
        yield Record(phrased(rng, asks, what=what), "", said)


def comparisons(rng: Random) -> Iterator[Record]:
    asks = ["Compare {things}.", "What is the difference between {things}?", "How do {things} differ?"]
    for things, said in rows(COMPARISONS):
        yield Record(phrased(rng, asks, things=things), "", said)


def true_or_false(rng: Random) -> Iterator[Record]:
    asks = ["True or false?", "Is this statement true or false?", "Say whether the statement is true or false."]
    for statement, said in rows(TRUE_OR_FALSE):
        yield Record(rng.choice(asks), statement, said)


def trivia(rng: Random) -> Iterator[Record]:
    for ask, said in rows(TRIVIA):
        yield Record(ask, "", said)
