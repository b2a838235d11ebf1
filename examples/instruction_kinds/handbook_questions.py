"""Questions about the handbook in `examples/documents`, by document.

Each row of a table is anchor | question | answer. The anchor is a phrase that stands once in
the document; `handbook.py` quotes the sentences around it as the passage to answer from.
"""

QUESTIONS = {
    "breeds.md": """
Its scientific name is | What is the scientific name of the alpaca? | The scientific name of the alpaca is Vicugna pacos.
There are two breeds | What are the two breeds of alpaca? | The two breeds are the huacaya and the suri.
the difference between them lies | Where does the difference between the two breeds lie? | The difference lies in the fleece, not in the size or the character of the animal.
About nine alpacas in every ten | How common is the huacaya? | About nine alpacas in every ten are huacayas.
a natural wave called crimp | What is the natural wave in huacaya fibre called? | It is called crimp.
a good choice for jumpers | What is huacaya yarn good for? | It is a good choice for jumpers, socks and hats.
fewer than one alpaca in ten | Which breed of alpaca is rarer? | The suri is the rarer breed.
long, twisted locks | What does the fleece of a suri look like? | It hangs down in long, twisted locks and has a silky shine.
weavers like it for scarves | What do weavers like to make from suri yarn? | Weavers like to make scarves, shawls and coats from it.
suris feel cold rain and wind | Why do suris feel the cold rain on their backs? | They feel it because their fleece parts along the spine.
stands between 80 and 100 centimetres | How tall is an adult alpaca at the shoulder? | An adult alpaca stands between 80 and 100 centimetres tall at the shoulder.
usually weighs between 50 and 85 | How much does an adult alpaca weigh? | An adult alpaca usually weighs between 50 and 85 kilograms.
live for 15 to 20 years | How long do alpacas live? | Alpacas often live for 15 to 20 years.
Each foot has two toes | How many toes does an alpaca have on each foot? | It has two toes on each foot.
recognise sixteen natural colours | How many natural colours do breeders in the United States recognise? | They recognise sixteen natural colours.
White fleece is the easiest | Which colour of fleece is the easiest to dye? | White fleece is the easiest to dye.
roughly twice as heavy | Which is heavier, a llama or an alpaca? | A llama is roughly twice as heavy as an alpaca.
curved like bananas | What do the ears of a llama look like? | They are long and curved like bananas.
Llamas were bred to carry loads | What were llamas bred for? | Llamas were bred to carry loads.
""",
    "history.md": """
began in North America | Where did the camel family begin? | The camel family began in North America.
crossed into South America | When did camels cross into South America? | They crossed into South America about three million years ago.
descends mainly from the vicuña | From which wild animal does the alpaca descend? | The alpaca descends mainly from the vicuña.
the llama descends from the guanaco | From which wild animal does the llama descend? | The llama descends from the guanaco.
In 2001 a study of DNA | In which year did a study of DNA show where the alpaca comes from? | The study was made in 2001.
The vicuña is a slender animal | What is special about the vicuña? | It has some of the finest fibre in the world.
Hunters in the high grasslands | When did people begin to tame alpacas? | They began between six and seven thousand years ago.
rock shelter of Telarmachay | What was found in the rock shelter of Telarmachay? | Bones were found that show how hunting slowly turned into herding.
The high grassland, called the puna | How high is the puna? | The puna lies about 4,000 metres above sea level.
Herders there depended on alpacas | What did the herders get from their alpacas? | They got cloth, meat and dung for fuel.
counted them with knotted cords | How did the Incas count their herds? | They counted them with knotted cords called quipus.
The finest cloth, known as cumbi | Who wore the cloth known as cumbi? | It was worn by the ruler and the nobles.
They prized fine cloth even above gold | What did the Incas prize above gold? | They prized fine cloth above gold.
The Spanish arrived in Peru in 1532 | When did the Spanish arrive in Peru? | The Spanish arrived in Peru in 1532.
brought sheep, goats and cattle | Which animals did the Spanish bring to Peru? | They brought sheep, goats and cattle.
in the highest and coldest pastures | Where did alpacas survive after the conquest? | They survived in the highest and coldest pastures.
Titus Salt came upon bales | Who found bales of alpaca fibre in Liverpool? | The English mill owner Titus Salt found them.
a village for his workers | What was the village of Titus Salt called? | The village was called Saltaire.
Peru is still home to | Which country has the most alpacas? | Peru has the most alpacas.
""",
    "feeding.md": """
a stomach with three chambers | How many chambers does the stomach of an alpaca have? | The stomach of an alpaca has three chambers.
an alpaca chews the cud | What does it mean to chew the cud? | It means that the animal brings swallowed food back up and chews it again.
Tiny microbes in the first chamber | What do the microbes in the first chamber do? | They break down the tough fibre in grass.
any change of food | Over how long should a change of food be spread? | A change of food should be spread over one to two weeks.
Good grass is the natural food | What is the natural food of an alpaca? | Good grass is its natural food.
grass hay replaces it in winter | What do alpacas eat in winter instead of grass? | They eat grass hay in winter.
between 1.5 and 2 per cent | How much dry food does an adult alpaca eat each day? | It eats between 1.5 and 2 per cent of its body weight in dry food each day.
a little over one kilogram of hay | How much hay does an alpaca of 70 kilograms need each day? | It needs a little over one kilogram of hay each day.
Hay should smell sweet | What should good hay be like? | Good hay should smell sweet and be free of dust and mould.
it is useful for thin animals | For which animals is lucerne useful? | Lucerne is useful for thin animals and for mothers with milk.
Too much copper is poisonous | Which mineral is poisonous to alpacas in large amounts? | Too much copper is poisonous to alpacas.
too little vitamin D | Which vitamin may alpacas lack in dark winters? | They may lack vitamin D.
drinks about four to six litres | How much water does an adult alpaca drink each day? | An adult alpaca drinks about four to six litres a day.
the ice on the trough | How often should the ice on the trough be broken in frosty weather? | The ice should be broken twice a day.
Buckets need scrubbing | How often should water buckets be scrubbed? | Buckets should be scrubbed once a week.
Yew, rhododendron | Which plants are poisonous to alpacas? | Yew, rhododendron, laurel, oleander and ragwort are poisonous to alpacas.
The condition score runs | What is the ideal condition score? | The ideal condition score is three.
A thin animal has a sharp spine | How can you tell that an alpaca is too thin? | A thin alpaca has a sharp spine.
""",
    "pasture-and-shelter.md": """
one hectare of good grass | How many alpacas can one hectare of good grass feed? | One hectare of good grass feeds about twelve alpacas.
one acre feeds about five | How many alpacas can live on one acre of good grass? | About five alpacas can live on one acre.
the smallest sensible herd | What is the smallest sensible herd of alpacas? | The smallest sensible herd is three animals.
rest for at least three weeks | How long should a paddock rest after it has been grazed? | It should rest for at least three weeks.
breaks the life cycle of many worms | Why should the grass be rested? | Resting lets the grass grow back and breaks the life cycle of many worms.
Dung should be picked up | How often should dung be picked up in small fields? | Dung should be picked up at least twice a week.
they nibble the grass without | Do alpacas pull up the roots of the grass? | No, they nibble the grass without pulling up its roots.
at least 1.2 metres high | How high should a fence for alpacas be? | A fence for alpacas should be at least 1.2 metres high.
Where stray dogs are a danger | How high should the fence be where stray dogs are a danger? | A fence of 1.5 metres is safer there.
the main purpose of the fence | What is the main purpose of the fence? | Its main purpose is to keep other animals out.
Barbed wire should never be used | Why should barbed wire never be used? | Barbed wire tears fleece and skin.
Mesh with large squares | Why is mesh with large squares risky? | A young alpaca can put its head through it and become trapped.
A shed with three walls | What kind of shed is enough in a mild climate? | A shed with three walls is enough in a mild climate.
at least two square metres | How much floor does each adult alpaca need under the roof? | Each adult needs at least two square metres of floor.
Straw makes a warm bed | What makes a warm bed for alpacas in winter? | Straw makes a warm bed in winter.
The doorway should be wide | Why should the doorway of the shed be wide? | A timid animal may be blocked by a bossy one if the doorway is narrow.
those parts should be wetted | Which parts of an alpaca should be wetted on a hot day? | The belly and the inside of the legs should be wetted.
Signs of heat stress | What are the signs of heat stress? | The signs are panting, drooling and a refusal to stand up.
""",
    "health.md": """
A healthy alpaca is alert | What does a healthy alpaca do? | A healthy alpaca is alert, eats with the others and chews the cud when it rests.
Grinding teeth is a common sign | What is grinding teeth a common sign of? | It is a common sign of stomach ulcers.
The normal body temperature | What is the normal body temperature of an adult alpaca? | It is between 37.5 and 38.9 degrees Celsius.
the heart beats 60 to 90 times | How fast does the heart of an alpaca beat at rest? | It beats 60 to 90 times a minute.
takes 10 to 30 breaths | How many breaths does an alpaca take in a minute? | It takes 10 to 30 breaths a minute at rest.
Adults should be weighed | How often should adult alpacas be weighed? | Adults should be weighed every month or two.
young animals every week | How often should young alpacas be weighed? | Young animals should be weighed every week.
A loss of weight | What may a loss of weight be a sign of? | It may be a sign of worms or bad teeth.
A first course is two injections | How many injections are in the first course of the vaccine? | The first course is two injections.
a booster at least once a year | How often is a booster vaccine needed? | A booster is needed at least once a year.
A laboratory can count | What can a laboratory count in a sample of dung? | A laboratory can count the worm eggs.
too many doses breed | Why should only some animals be dosed for worms? | Too many doses breed resistant worms.
pale inner eyelids | What are pale inner eyelids a warning of? | They are a warning of the barber's pole worm.
Mange is caused by | What causes mange? | Mange is caused by tiny mites.
the meningeal worm | What can the meningeal worm damage? | It can damage the spinal cord.
Toenails are trimmed | How often are the toenails of an alpaca trimmed? | They are trimmed every two to four months.
sharp fighting teeth | Why are the fighting teeth of males blunted? | They are blunted so that the males cannot wound other males.
Call a vet at once | When should you call a vet at once? | Call a vet at once if an animal cannot stand, strains without passing urine, or has not eaten for a day.
""",
    "shearing.md": """
they must be shorn once a year | How often must alpacas be shorn? | Alpacas must be shorn once a year.
Without shearing they overheat | What happens to alpacas that are not shorn? | They overheat in summer and their fibre becomes matted.
Most owners shear in late spring | When do most owners shear their alpacas? | Most owners shear in late spring.
May or June | In which months are alpacas shorn in the northern hemisphere? | They are usually shorn in May or June.
shear every second year | Why do some owners shear suris every second year? | They do it to obtain longer locks.
The fleece must be dry | Why must the fleece be dry before shearing? | Wet fibre goes mouldy in the bag and makes the shears dangerous.
should not be fed for several hours | Should alpacas be fed just before shearing? | No, they should not be fed for several hours before shearing.
six to ten minutes | How long does a skilled shearer need for one alpaca? | A skilled shearer needs about six to ten minutes.
soft ropes hold | Why are the legs held with soft ropes during shearing? | The ropes hold the legs so that the alpaca cannot kick.
An old sock over the nose | What is an old sock used for at shearing? | It goes over the nose and catches the spit of a cross alpaca.
White animals are shorn first | Which animals are shorn first? | White animals are shorn first.
The best fibre is called the blanket | What is the best fibre of the fleece called? | The best fibre is called the blanket.
goes into a third bag | What is the coarse fibre from the belly used for? | It is used for felt, rugs or garden mulch.
Every bag carries a label | What is written on the label of each bag? | The label gives the name of the animal, the date and the part of the fleece.
between two and four kilograms of fibre | How much fibre does an adult alpaca give in a year? | An adult alpaca gives between two and four kilograms of fibre a year.
The first fleece of a young animal | Which fleece of an alpaca is usually the finest? | The first fleece is usually the finest.
trim toenails, check teeth | Which other jobs can be done on shearing day? | You can trim toenails, check teeth and give vaccines.
for about two weeks | How long does the herd need shade and shelter after shearing? | The herd needs shade and shelter for about two weeks.
""",
    "fibre-grades.md": """
one micron is a thousandth | How long is one micron? | One micron is a thousandth of a millimetre.
The lower the number of microns | Is fibre softer when the number of microns is lower? | Yes, the lower the number of microns, the softer the fibre feels.
called super baby | What is fibre of up to 20 microns called in Peru? | It is called super baby.
between 20 and 23 microns | How many microns does baby alpaca have? | Baby alpaca has between 20 and 23 microns.
anything above 31.5 microns | What is fibre above 31.5 microns called? | It is called coarse.
under the name royal alpaca | What do some firms call fibre below 19 microns? | They call it royal alpaca.
is about fineness, not about age | Does baby alpaca always come from a young animal? | No, the name is about fineness, not about age.
A human hair is roughly | How thick is a human hair? | A human hair is roughly 70 microns thick.
Fine merino wool measures | How fine is merino wool? | Fine merino wool measures about 18 to 20 microns.
is called the comfort factor | What is the comfort factor? | The comfort factor is the share of fibres at or below 30 microns.
Most people begin to feel a prickle | When does a fleece begin to prickle? | It begins to prickle when many of the fibres are thicker than 30 microns.
tiny air pockets | Why is alpaca fibre warm? | Many of the fibres have tiny air pockets in the core, and trapped air is a poor carrier of heat.
The scales on the surface | Why does alpaca feel smooth? | The scales on the fibre lie flatter than those of sheep's wool.
raw sheep's wool is full of lanolin | What is raw sheep's wool full of? | It is full of lanolin.
the middle of the side | From which part of the animal is the sample cut? | The sample is cut from the middle of the side.
A low standard deviation means | What does a low standard deviation mean? | It means that the fleece is even.
mills usually want 75 to 150 | What staple length do mills usually want for fine yarn? | They usually want 75 to 150 millimetres.
is called tender | What is a lock called if it snaps when it is tugged? | It is called tender.
""",
    "washing-and-spinning.md": """
The steps are skirting | What are the steps from raw fleece to yarn? | The steps are skirting, washing, carding or combing, spinning and plying.
Skirting means | What does skirting mean? | Skirting means picking out everything that does not belong in good yarn.
make yarn prickly | What makes yarn prickly? | Long, stiff guard hairs make yarn prickly.
it needs far less soap | Why does alpaca need less soap than sheep's wool? | It needs less soap because it holds almost no grease.
for twenty minutes in hot water | How long do many spinners soak the fleece? | They soak it for twenty minutes.
The water must not be stirred | Why must the water not be stirred? | Rubbing and sudden changes of temperature turn the fibre into felt.
dried on a rack in the shade | Where is the wet fleece dried? | It is dried on a rack in the shade.
a light roll called a rolag | What is a rolag? | A rolag is a light roll of carded fibre.
a soft, airy woollen yarn | What kind of yarn does carded fibre give? | Carded fibre gives a soft, airy woollen yarn.
a smooth, strong worsted yarn | What kind of yarn does combed fibre give? | Combed fibre gives a smooth, strong worsted yarn.
Alpaca is more slippery than wool, and it has less stretch. It therefore | Why does alpaca need more twist than wool? | It needs more twist because it is more slippery and has less stretch.
about 20 to 30 per cent wool | How much wool is in a good blend? | A good blend has about 20 to 30 per cent wool.
A drop spindle is the cheapest | What is the cheapest tool to learn spinning on? | A drop spindle is the cheapest tool to learn on.
Plying means | What does plying mean? | Plying means twisting two or more strands together in the opposite direction to the spin.
which sets the twist | What is done with the finished skein? | It is soaked in warm water and hung up to dry.
washed by hand in cool water | How should an alpaca jumper be washed? | It should be washed by hand in cool water with a mild soap.
dried flat on a towel | Why should an alpaca jumper be dried flat? | A wet jumper stretches if it hangs.
Moths like alpaca | How are clean alpaca garments stored? | They are stored in closed bags, often with lavender or cedar wood.
""",
    "behaviour.md": """
becomes anxious when it is kept alone | How does an alpaca feel when it is kept alone? | It becomes anxious.
disputes are settled | How do alpacas settle disputes? | They settle disputes with raised heads, spitting and short chases.
which is called pronking | What is pronking? | Pronking is when young alpacas race about together and bounce on all four legs.
The most common sound | What is the most common sound of an alpaca? | The most common sound is a soft hum.
Alpacas hum when | Why do alpacas hum? | Alpacas hum when they are curious, worried, tired or calling to their young.
The alarm call is | What does the alarm call of an alpaca sound like? | It is a loud, high sound, rather like a squeaky toy.
called orgling | When do males make the sound called orgling? | They make it while they mate.
a soft clucking sound | Which sound may a friendly alpaca make? | It may make a soft clucking sound.
Alpacas spit mostly | Whom do alpacas mostly spit at? | They mostly spit at each other.
lifts its chin | How can you tell that an alpaca is about to spit? | It lifts its chin and lays back its ears.
The spit is half-digested grass | What is alpaca spit made of? | It is half-digested grass from the stomach.
This habit keeps the grazing clean | Why is it good that alpacas use the same dung piles? | It keeps the grazing clean, limits the spread of worms and makes the field easy to tidy.
move a shovelful of dung | How can an owner start a dung pile in a new place? | The owner can move a shovelful of dung there.
it does not burn plants | Can alpaca dung be spread on the garden? | Yes, it can be spread without long composting, because it does not burn plants.
a position called the cush | What is the cush? | The cush is the position in which an alpaca rests with its legs folded under the body.
the dust bath loosens dirt | What does a dust bath do for an alpaca? | It loosens the dirt in the fleece.
dislike being touched | Where do most alpacas dislike being touched? | They dislike being touched on the head and the legs.
may treat people as rivals | Why should a bottle-fed male not be petted too much? | He may treat people as rivals when he grows up, and he can become dangerous.
""",
    "breeding-and-crias.md": """
A young alpaca is called | What is a young alpaca called? | A young alpaca is called a cria.
about 18 months old and | At what age can a female alpaca be bred? | She can be bred when she is about 18 months old.
between two and three years of age | When are male alpacas usually ready to work? | They are usually ready between two and three years of age.
usually lasts 15 to 30 minutes | How long does mating usually last? | Mating usually lasts 15 to 30 minutes.
she is probably pregnant | What does it mean if a female spits at a male two weeks after mating? | It means that she is probably pregnant.
with an ultrasound scan | How can a vet confirm a pregnancy? | A vet can confirm it with an ultrasound scan after about two months.
A pregnancy lasts about | How long does the pregnancy of an alpaca last? | It lasts about eleven and a half months.
Twins are very rare | Are twins common among alpacas? | No, twins are very rare.
Most crias are born | At what time of day are most crias born? | Most crias are born in the morning or around midday.
the nose and two front feet | What comes first in a normal birth? | The nose and two front feet come first.
The mother does not lick | Does an alpaca mother lick her newborn dry? | No, she does not lick her newborn dry.
dipped in an iodine solution | Why is the navel dipped in an iodine solution? | It is dipped to prevent infection.
weighs between six and nine | How much does a newborn cria weigh? | A newborn cria weighs between six and nine kilograms.
It should stand within | How soon should a newborn cria stand? | It should stand within about two hours.
The first milk, called colostrum | What does colostrum do? | Colostrum protects the cria from disease.
gains at least 100 grams | How much weight does a healthy cria gain each day? | A healthy cria gains at least 100 grams a day.
weaned at about six months | At what age are crias weaned? | Crias are weaned at about six months of age.
two or more crias together | Why is it kind to wean two or more crias together? | They keep each other company.
""",
    "transport-shows-and-guards.md": """
Training can begin when | When can halter training begin? | It can begin when a cria is about six months old.
lessons of ten minutes | How long should a lesson on the halter be? | A lesson should be ten minutes long.
The halter must sit high | Where must the halter sit? | It must sit high on the nose, close to the eyes.
can stop the animal from breathing | What can happen if the halter slips down the nose? | It can stop the animal from breathing.
On the road an alpaca lies down | What does an alpaca do during a journey by road? | It lies down of its own accord.
never be tied by the head | Why should an alpaca never be tied by the head in a trailer? | A fall could break its neck.
An animal should not travel alone | Why should an alpaca not travel alone? | A familiar companion keeps it calm.
stops about every four hours | How often should the driver stop on a long journey? | The driver should stop about every four hours.
Travel at night | When is it best to travel in order to avoid the heat? | It is best to travel at night or in the early morning.
A newcomer is kept apart | How long is a new alpaca kept apart from the herd? | It is kept apart for at least three weeks.
its dung is tested | What is tested while a newcomer is kept apart? | Its dung is tested for worms.
grouped by breed | How are alpacas grouped at a show? | They are grouped by breed, colour, age and sex.
In a fleece show | What is judged in a fleece show? | Only the shorn fleece is judged.
should not be washed or brushed | Why should an alpaca not be brushed before a show? | Brushing spoils the structure of the fleece.
called wethers | What are wethers? | Wethers are castrated males.
They give the alarm call | What do guard alpacas do when they see a fox? | They give the alarm call and run at the fox, and they may kick it or stamp on it.
too small to be ridden | Can you ride an alpaca? | No, alpacas are too small to be ridden.
a strong llama can carry | How much can a strong llama carry all day? | A strong llama can carry about 25 kilograms all day.
""",
    "glossary.md": """
A tui is | What is a tui? | A tui is a weaned young alpaca.
A hembra is a female | What is a female alpaca called? | A female alpaca is called a hembra.
a macho is a male | What is a macho? | A macho is a male kept for breeding.
The dam of a cria | What is the mother of a cria called? | The mother of a cria is called the dam.
A maiden is | What is a maiden? | A maiden is a female that has not yet been bred.
Camelid is the name | Which animals are camelids? | Camels, llamas, alpacas, guanacos and vicuñas are camelids.
A huarizo is the young | What is a huarizo? | A huarizo is the young of a male llama and a female alpaca.
Lustre is the shine | In which breed is lustre strongest? | Lustre is strongest in suris.
A staple is | What is a staple? | A staple is a lock of fibre as it grows on the animal.
Handle is the word | What does the word handle mean for a fleece? | It means how soft the fleece feels in the hand.
Guard hair is | What is guard hair? | Guard hair is the long, straight, coarse hair that grows among the finer fibres.
Vegetable matter means | What is vegetable matter in a fleece? | It is the bits of hay, seeds and burrs that are caught in the fleece.
A spit-off is | What is a spit-off? | A spit-off is a test for pregnancy.
A faecal egg count | What does a faecal egg count show? | It shows how many worm eggs there are in the dung.
Quarantine is the time | What is quarantine? | Quarantine is the time that a new animal spends apart from the herd.
Rickets is a weakness | What causes rickets? | Rickets is caused by a lack of vitamin D or phosphorus.
Noils are | What are noils? | Noils are the short fibres that the combs remove.
A stud fee is | What is a stud fee? | A stud fee is the price paid for the use of a breeding male.
""",
}

# document | anchor | a question that the sentences around the anchor leave open
UNANSWERED = """
breeds.md | live for 15 to 20 years | How long do llamas live?
breeds.md | recognise sixteen natural colours | How much does a white fleece cost?
history.md | The Spanish arrived in Peru in 1532 | How many ships did the Spanish have?
history.md | a village for his workers | How many people lived in the village?
history.md | The finest cloth, known as cumbi | What colour was the cloth?
feeding.md | drinks about four to six litres | How much water does a horse drink each day?
feeding.md | Yew, rhododendron | Are tomatoes safe for alpacas?
pasture-and-shelter.md | at least 1.2 metres high | How much does a fence cost?
pasture-and-shelter.md | A shed with three walls | What colour should the shed be?
health.md | The normal body temperature | What is the normal body temperature of a goat?
health.md | A first course is two injections | How much does the vaccine cost?
shearing.md | six to ten minutes | How much does a shearer earn in a day?
fibre-grades.md | A human hair is roughly | How thick is the hair of a camel?
washing-and-spinning.md | A drop spindle is the cheapest | Where can you buy a spinning wheel?
behaviour.md | The most common sound | What sound does a llama make?
breeding-and-crias.md | A pregnancy lasts about | How long does the pregnancy of a cow last?
transport-shows-and-guards.md | The halter must sit high | Who invented the halter?
glossary.md | A tui is | What does an alpaca farmer earn?
"""
