"""Invented passages: whole ones, and templates with blanks and the values that fill them.

Each entry is (passage, [(question, answer), ...], a question that the passage leaves open).
"""

from instruction_kinds.english import word_list

VALUES = {
    "name": word_list("Lena Omar Julia Pedro Sofia Martin Alice Tomas Ruth Victor"),
    "friend": word_list("Hanna Leo Marta Simon Eva Daniel Clara Peter Nora Adam"),
    "town": word_list("Millford Ashby Redwater Oakham Fernhill Stonebridge Larkfield Eastport"),
    "city": word_list("Lima Oslo Vienna Dublin Lisbon Athens Boston Prague"),
    "number": ["three", "four", "five", "six", "seven", "eight", "nine", "twelve"],
    "big": ["20", "25", "30", "40", "45", "60", "80"],
    "day": word_list("Monday Tuesday Wednesday Thursday Friday Saturday"),
    "month": word_list("March April May June July September October"),
    "year": ["1878", "1902", "1925", "1948", "1963", "1987", "1999"],
    "colour": ["red", "blue", "green", "yellow", "white", "black"],
    "job": ["baker", "nurse", "carpenter", "teacher", "gardener", "pilot"],
    "food": ["bread", "cheese", "honey", "soup", "pasta", "cake"],
    "animal": ["dog", "cat", "rabbit", "hamster", "puppy", "kitten"],
    "pet": ["Bella", "Rocky", "Molly", "Pepper", "Biscuit", "Luna"],
    "alpaca": ["Misty", "Caramel", "Inti", "Pearl", "Rosa", "Bruno"],
    "hour": ["five", "six", "seven", "eight", "nine", "ten"],
}

TEMPLATES = [
    (
        "{name} works as a {job} in {town}. Before that, {name} lived in {city} for {number} years. On {day}s {name} sings in a choir.",
        [
            ("What is {name}'s job?", "{name} is a {job}."),
            ("Where does {name} work?", "{name} works in {town}."),
            ("In which city did {name} live before?", "{name} lived in {city}."),
            ("When does {name} sing in a choir?", "{name} sings in a choir on {day}s."),
            ("How long did {name} live in {city}?", "{name} lived there for {number} years."),
        ],
        "How old is {name}?",
    ),
    (
        "The old mill in {town} was built in {year}. It has {number} floors and a {colour} roof. Visitors can see it every {day}, and a ticket costs {big} cents.",
        [
            ("When was the mill built?", "The mill was built in {year}."),
            ("How many floors does the mill have?", "The mill has {number} floors."),
            ("What colour is the roof of the mill?", "The roof is {colour}."),
            ("How much does a ticket cost?", "A ticket costs {big} cents."),
            ("On which day can visitors see the mill?", "Visitors can see it every {day}."),
        ],
        "Who built the mill?",
    ),
    (
        "{name} has a {colour} bicycle, and {friend} has a new tent. In {month} they will ride to {town}, which is {big} kilometres away. They will stay there for {number} nights.",
        [
            ("Who has a new tent?", "{friend} has a new tent."),
            ("What colour is {name}'s bicycle?", "The bicycle is {colour}."),
            ("Where will they ride?", "They will ride to {town}."),
            ("How far away is {town}?", "{town} is {big} kilometres away."),
            ("How long will they stay?", "They will stay for {number} nights."),
            ("In which month will they ride?", "They will ride in {month}."),
        ],
        "How much did the tent cost?",
    ),
    (
        "The shop of {name} sells {food} and tea. It opens at {hour} in the morning and is closed on {day}s. Every customer gets a {colour} paper bag.",
        [
            ("What does {name}'s shop sell?", "The shop sells {food} and tea."),
            ("When does the shop open?", "The shop opens at {hour} in the morning."),
            ("On which day is the shop closed?", "The shop is closed on {day}s."),
            ("What does every customer get?", "Every customer gets a {colour} paper bag."),
        ],
        "In which street is the shop?",
    ),
    (
        "{friend} has a {animal} called {pet}. {pet} is {number} months old and likes to sleep under the {colour} chair. When {friend} travels to {city}, {name} looks after {pet}.",
        [
            ("What is the name of {friend}'s {animal}?", "The {animal} is called {pet}."),
            ("How old is {pet}?", "{pet} is {number} months old."),
            ("Where does {pet} like to sleep?", "{pet} likes to sleep under the {colour} chair."),
            ("Who looks after {pet} when {friend} travels?", "{name} looks after {pet}."),
            ("What kind of animal is {pet}?", "{pet} is a {animal}."),
        ],
        "What does {pet} eat in the morning?",
    ),
    (
        "{name} keeps {big} alpacas on a farm near {town}. The oldest is called {alpaca} and has a {colour} halter. The shearer comes on a {day} in {month}.",
        [
            ("How many alpacas does {name} keep?", "{name} keeps {big} alpacas."),
            ("What is the oldest alpaca called?", "The oldest alpaca is called {alpaca}."),
            ("Where is the farm?", "The farm is near {town}."),
            ("In which month does the shearer come?", "The shearer comes in {month}."),
            ("What colour is {alpaca}'s halter?", "{alpaca}'s halter is {colour}."),
        ],
        "What is the name of the shearer?",
    ),
    (
        "The town of {town} will hold a market on {day}. There will be {big} stalls with {food}, flowers and old books. {name} will play the violin at {hour} in the evening.",
        [
            ("On which day is the market?", "The market is on {day}."),
            ("How many stalls will there be?", "There will be {big} stalls."),
            ("Who will play the violin?", "{name} will play the violin."),
            ("What can people buy at the market?", "People can buy {food}, flowers and old books."),
            ("When will {name} play?", "{name} will play at {hour} in the evening."),
        ],
        "How long will the market last?",
    ),
    (
        "Dear {friend}, I am writing from {city}. The weather is fine, and my hotel is a {colour} house by the river. I will be home on {day} and will bring you some {food}. Yours, {name}",
        [
            ("Who wrote the letter?", "{name} wrote the letter."),
            ("To whom is the letter written?", "The letter is written to {friend}."),
            ("From which city does {name} write?", "{name} writes from {city}."),
            ("What will {name} bring?", "{name} will bring some {food}."),
            ("When will {name} be home?", "{name} will be home on {day}."),
            ("What is the hotel like?", "The hotel is a {colour} house by the river."),
        ],
        "How much does the hotel cost?",
    ),
]

PASSAGES = [
    (
        "Mrs Olsen is 84 years old and swims in the lake every morning, even in winter. She learned to swim from her father, who was a fisherman. After her swim she drinks hot milk with honey.",
        [
            ("What does Mrs Olsen do every morning?", "She swims in the lake every morning."),
            ("Who taught Mrs Olsen to swim?", "Her father taught her to swim."),
            ("What does Mrs Olsen drink after her swim?", "She drinks hot milk with honey."),
        ],
        "How deep is the lake?",
    ),
    (
        "The Blue Lantern is a small café near the station. Its apple cake is made with apples from the owner's garden. The café has only six tables, so it is wise to come before three o'clock.",
        [
            ("Where is the Blue Lantern?", "The Blue Lantern is near the station."),
            ("Where do the apples for the cake come from?", "They come from the owner's garden."),
            ("Why is it wise to come before three o'clock?", "The café has only six tables."),
        ],
        "What is the name of the owner?",
    ),
    (
        "To make lemonade, squeeze four lemons into a jug and add five spoons of sugar. Pour in one litre of cold water and stir until the sugar is gone. Serve the lemonade with ice and a leaf of mint.",
        [
            ("How many lemons do you need for the lemonade?", "You need four lemons."),
            ("How much water do you pour in?", "You pour in one litre of cold water."),
            ("What do you serve the lemonade with?", "You serve it with ice and a leaf of mint."),
        ],
        "How many people can drink from the jug?",
    ),
    (
        "Bruno the donkey carried the post over the mountain for eleven years. When the new road was opened, the village gave him a green meadow of his own. Children still bring him carrots on Sundays.",
        [
            ("What did Bruno carry over the mountain?", "Bruno carried the post."),
            ("What did the village give Bruno?", "The village gave him a green meadow of his own."),
            ("When do the children bring carrots?", "They bring carrots on Sundays."),
        ],
        "What is the name of the village?",
    ),
    (
        "The ferry to Gull Island leaves from the old harbour at ten and at two. The trip takes 35 minutes. Dogs travel free, but bicycles need a ticket.",
        [
            ("Where does the ferry leave from?", "The ferry leaves from the old harbour."),
            ("How long does the trip take?", "The trip takes 35 minutes."),
            ("Who travels free on the ferry?", "Dogs travel free."),
        ],
        "How many people live on Gull Island?",
    ),
    (
        "Mr Costa repairs clocks in a cellar under the town hall. His oldest clock is from 1790 and still shows the right time. He says that dust is the worst enemy of a clock.",
        [
            ("Where does Mr Costa work?", "He works in a cellar under the town hall."),
            ("How old is his oldest clock?", "His oldest clock is from 1790."),
            ("What is the worst enemy of a clock, according to Mr Costa?", "Dust is the worst enemy of a clock."),
        ],
        "How much does a repair cost?",
    ),
    (
        "On Saturday the Foxes beat the Herons by three goals to one. The first goal was shot by Nina Weber after only two minutes. Because of the heavy rain, only ninety people came to watch.",
        [
            ("Who won the match?", "The Foxes won the match."),
            ("Who shot the first goal?", "Nina Weber shot the first goal."),
            ("Why did only ninety people come to watch?", "Only ninety people came because of the heavy rain."),
        ],
        "Who is the coach of the Herons?",
    ),
    (
        "The school garden is shared by three classes. The first class grows beans, the second class grows pumpkins, and the third class looks after the bees. In autumn they cook a soup together.",
        [
            ("What does the second class grow?", "The second class grows pumpkins."),
            ("Which class looks after the bees?", "The third class looks after the bees."),
            ("What do the classes do in autumn?", "They cook a soup together."),
        ],
        "How many pupils are in the first class?",
    ),
    (
        "Sara found a wallet in the park with 200 euros and a photo of a small boy. She took it to the police. The owner, an old sailor, thanked her with a ship in a bottle.",
        [
            ("What was in the wallet?", "There were 200 euros and a photo of a small boy in it."),
            ("Where did Sara take the wallet?", "She took it to the police."),
            ("How did the owner thank Sara?", "He thanked her with a ship in a bottle."),
        ],
        "",
    ),
    (
        "The night train to the coast has two sleeping cars and a small kitchen. It leaves at half past nine in the evening and arrives at seven in the morning. Breakfast is brought to every bed.",
        [
            ("When does the night train leave?", "It leaves at half past nine in the evening."),
            ("When does the train arrive?", "It arrives at seven in the morning."),
            ("How many sleeping cars does the train have?", "It has two sleeping cars."),
        ],
        "How fast does the train go?",
    ),
    (
        "Green Hill Farm keeps two alpacas, Inti and Luna, as guards for its ducks. Last spring Luna chased away a fox before it could reach the pond. Since then no duck has been lost.",
        [
            ("What do the two alpacas guard?", "They guard the ducks."),
            ("What did Luna do last spring?", "Luna chased away a fox."),
            ("What are the names of the alpacas?", "The alpacas are called Inti and Luna."),
        ],
        "How old is Luna?",
    ),
    (
        "My grandfather built a radio when he was twelve. He used an old cigar box, some wire and a pair of headphones. The first thing that he heard was a weather report for ships.",
        [
            ("How old was the grandfather when he built a radio?", "He was twelve."),
            ("What did he use to build the radio?", "He used an old cigar box, some wire and a pair of headphones."),
            ("What did he hear first?", "He heard a weather report for ships."),
        ],
        "In which country did the grandfather live?",
    ),
    (
        "The library lends books for four weeks. For each day that a book is late, you pay ten cents. Children pay nothing, but they must help to put back five books.",
        [
            ("For how long does the library lend books?", "It lends books for four weeks."),
            ("How much do you pay for each late day?", "You pay ten cents for each day."),
            ("What must children do if a book is late?", "They must help to put back five books."),
        ],
        "How many books does the library have?",
    ),
    (
        "Carla runs a small dye works in the Andes. She makes red from tiny insects, yellow from flowers and brown from walnut shells. Tourists may dye a ball of alpaca yarn and take it home.",
        [
            ("Where is Carla's dye works?", "It is in the Andes."),
            ("What does Carla make yellow from?", "She makes yellow from flowers."),
            ("What may tourists do at the dye works?", "They may dye a ball of alpaca yarn and take it home."),
        ],
        "How many tourists come each year?",
    ),
    (
        "It snowed so much on Thursday that the school bus could not run. The pupils in the valley stayed at home, but five children from the hill came to school on skis. Their teacher gave them hot chocolate.",
        [
            ("Why could the school bus not run?", "It snowed too much."),
            ("How did the five children come to school?", "They came on skis."),
            ("What did the teacher give the children?", "The teacher gave them hot chocolate."),
        ],
        "What is the name of the teacher?",
    ),
    (
        "The lighthouse on Cape Hollow is 42 metres high and was painted white and red in 1931. Since 1988 its lamp has worked without a keeper. The last keeper, Jonas Hill, still lives next to it.",
        [
            ("How high is the lighthouse?", "The lighthouse is 42 metres high."),
            ("Who was the last keeper of the lighthouse?", "Jonas Hill was the last keeper."),
            ("Since when has the lamp worked without a keeper?", "It has worked without a keeper since 1988."),
        ],
        "",
    ),
    (
        "Tim wanted to surprise his sister, so he hid her present in the oven. She decided to bake a pizza and turned the oven on. Luckily the present was a cooking pot.",
        [
            ("Where did Tim hide the present?", "He hid it in the oven."),
            ("What did the sister decide to bake?", "She decided to bake a pizza."),
            ("What was the present?", "The present was a cooking pot."),
        ],
        "How old is Tim's sister?",
    ),
    (
        "Our hotel offers a walk with alpacas every afternoon at four. The walk leads through the forest and takes ninety minutes. Please wear strong shoes and leave your dog in the room.",
        [
            ("When does the alpaca walk begin?", "It begins at four in the afternoon."),
            ("How long does the walk take?", "The walk takes ninety minutes."),
            ("What should guests wear on the walk?", "They should wear strong shoes."),
        ],
        "How many alpacas does the hotel have?",
    ),
]
