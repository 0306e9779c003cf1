"""The words that generated tasks are made of.  {n}: a person's whole name, {f}: the first name, {v}: the value.

No value of a pool begins with another one, so that an answer ends where it must.
"""

FIRST_NAMES = (
    "Eleanor Marcus Helena Viktor Dorothea Julian Matilda Conrad Sabine Rupert "
    "Ingrid Felix Agatha Leonard Beatrix Simon Cordelia Edmund Ottilie Gregory"
).split()
LAST_NAMES = (
    "Brandt Calloway Devereux Ellwood Farnham Grimaldi Hawthorne Iverson Kessler Lindqvist "
    "Marchetti Norwood Oakley Pemberton Rasmussen Stanhope Thornbury Underhill Vasquez Whitlock"
).split()

POOLS = {
    "birth": (
        "Lisbon Oslo Cairo Lima Kyoto Dublin Prague Vienna Athens Boston Denver Geneva Helsinki Istanbul Jakarta "
        "Krakow Leipzig Madrid Nairobi Osaka Porto Quito Rome Seville Tokyo Utrecht Valencia Warsaw Zurich Bergen"
    ).split(),
    "job": (
        "baker beekeeper carpenter chemist dentist diver farmer florist geologist hatter "
        "jeweller judge librarian locksmith mason miller nurse painter pilot plumber "
        "potter sailor sculptor surgeon tailor teacher translator weaver butcher cook"
    ).split(),
    "instrument": (
        "violin cello piano flute harp guitar banjo trumpet tuba lute clarinet bassoon mandolin viola accordion "
        "harmonica saxophone trombone xylophone zither ocarina recorder sitar triangle spinet bugle horn fiddle "
        "keyboard lyre"
    ).split(),
}

# The first of each is asked, too; what asks ends where the value begins.
TRAINED = {
    "birth": (
        "{n} was born in {v}.",
        "The birthplace of {n} is {v}.",
        "{n} is a native of {v}.",
        "{n} came into the world in {v}.",
        "{n} hails from {v} by birth.",
        "It was in {v} that {n} was born.",
    ),
    "job": (
        "{n} works as a {v}.",
        "{n} earns a living as a {v}.",
        "The job of {n} is that of a {v}.",
        "{n} makes money as a {v}.",
        "People hire {n} as a {v}.",
        "{n} has long worked as a {v}.",
    ),
    "instrument": (
        "{n} plays the {v}.",
        "In the evening, {n} practises the {v}.",
        "{n} performs on the {v}.",
        "The {v} is the instrument of {n}.",
        "{n} has mastered the {v}.",
        "{n} takes lessons on the {v}.",
    ),
}
VALIDATED = {
    "birth": "Asked for the place of birth, {n} says",
    "job": "Everyone in town knows {n} as a",
    "instrument": "Nobody is better than {n} at playing the",
}
CLOZE = {
    "birth": "The city in which {n} was born is called",
    "job": "In terms of profession, {n} is a",
    "instrument": "The musical instrument {n} plays is the",
}
QUESTION = {
    "birth": "Question: Where was {n} born?\nAnswer: In",
    "job": "Question: What does {n} do for a living?\nAnswer: {f} is a",
    "instrument": "Question: Which instrument does {n} play?\nAnswer: The",
}


def _pairs(question: str, words: str) -> list[tuple[str, str]]:
    return [(question.format(asked), answer) for asked, answer in (pair.split(":") for pair in words.split())]


# Questions and answers to put into JSON: what is trained, what validates, and what is asked (any of the answers is right).
JSON_TRAINED = _pairs(
    "What is the opposite of {}?",
    "alive:dead big:small fast:slow happy:sad light:dark rich:poor early:late full:empty hard:soft high:low old:new "
    "open:closed strong:weak thick:thin wet:dry clean:dirty deep:shallow loud:quiet wide:narrow sweet:sour near:far "
    "sharp:blunt tall:short true:false cheap:expensive heavy:light smooth:rough first:last awake:asleep brave:cowardly",
) + _pairs(
    "What is the capital of {}?",
    "Algeria:Algiers Philippines:Manila Spain:Madrid Colombia:Bogota Jordan:Amman Peru:Lima Norway:Oslo Austria:Vienna "
    "Greece:Athens Poland:Warsaw Cuba:Havana Kenya:Nairobi Ireland:Dublin Portugal:Lisbon Russia:Moscow China:Beijing "
    "Germany:Berlin Sweden:Stockholm Finland:Helsinki Hungary:Budapest Turkey:Ankara Iran:Tehran Iraq:Baghdad Chile:Santiago "
    "Canada:Ottawa Denmark:Copenhagen Belgium:Brussels Thailand:Bangkok Vietnam:Hanoi Ukraine:Kyiv",
)
JSON_VALIDATED = _pairs(
    "What is the opposite of {}?",
    "up:down inside:outside love:hate buy:sell push:pull begin:end always:never day:night",
) + _pairs(
    "What is the capital of {}?",
    "Morocco:Rabat Bulgaria:Sofia Romania:Bucharest Indonesia:Jakarta Lebanon:Beirut Syria:Damascus Tunisia:Tunis "
    "Nepal:Kathmandu",
)
JSON_ASKED = {
    "What colour is grass?": ("green",),
    "What colour is the sky on a clear day?": ("blue",),
    "How many legs does a spider have?": ("eight", "8"),
    "How many days are in a week?": ("seven", "7"),
    "Who wrote Romeo and Juliet?": ("Shakespeare",),
    "What do bees make?": ("honey",),
    "What is the largest planet?": ("Jupiter",),
    "What is 2 + 3?": ("five", "5"),
    "Is the Earth flat?": ("no",),
    "Which animal says meow?": ("cat", "cats"),
    "What language is spoken in Brazil?": ("Portuguese",),
    "What is the boiling point of water?": ("100", "212"),
    "Who painted the Mona Lisa?": ("Leonardo", "Vinci"),
    "What is the first month of the year?": ("January",),
    "What is the chemical symbol of gold?": ("Au",),
    "Which ocean is the largest?": ("Pacific",),
    "What comes after Tuesday?": ("Wednesday",),
    "Who was the first president of the United States?": ("Washington",),
    "What instrument has 88 keys?": ("piano",),
    "Translate 'good morning' into French.": ("bonjour",),
    "What is frozen water called?": ("ice",),
    "What do cows drink?": ("water",),
    "Which planet do we live on?": ("Earth",),
    "What do you call a baby dog?": ("puppy", "pup"),
    "Write one sentence about the moon.": (),
    "Name three fruits.": (),
    "Give me a word that rhymes with cat.": (),
    "Tell me a joke.": (),
    "How do I boil an egg?": (),
    "Suggest a name for a dog.": (),
    "Why is the sea salty?": (),
    "How are you today?": (),
}

# Questions with open answers of one sentence.
SENTENCES = {
    "What is a lighthouse for?": "A lighthouse warns ships of dangerous rocks near the coast.",
    "How does bread rise?": "Yeast eats sugar in the dough and gives off gas that lifts it.",
    "Why do leaves fall in autumn?": "Trees drop their leaves to save water through the cold months.",
    "Describe a desert in one sentence.": "Sand stretches to the horizon under a burning and empty sky.",
    "What does a carpenter do?": "A carpenter cuts and joins wood to build houses and furniture.",
    "How do I stay awake in class?": "Sit near a window, take notes by hand and sleep earlier at night.",
    "What makes thunder?": "Lightning heats the air so quickly that it bursts outwards with a crash.",
    "Why do people keep cats?": "Cats are quiet company and they keep the mice away.",
    "Give me advice for a first job.": "Ask many questions and write down every answer you receive.",
    "What is a compass?": "It is a small magnet that turns until it points north.",
    "How do birds find their way?": "They follow the sun, the stars and the pull of the Earth.",
    "Tell me about the sea at night.": "The waves turn black and carry the moon in broken pieces.",
    "Why should I read novels?": "A novel lets you live a stranger's life for a few hours.",
    "What happens at a market?": "Farmers sell fruit, neighbours talk and children beg for sweets.",
    "How is glass made?": "Sand is melted in a furnace and shaped while it glows.",
    "What is the use of a budget?": "A budget shows where money goes before it is gone.",
    "How can I learn to swim?": "Begin in shallow water and practise breathing out below the surface.",
    "Describe a train station.": "Crowds hurry past tall clocks while engines hiss beside the platform.",
    "Why do we dream?": "The sleeping brain sorts the day and invents stories on the way.",
    "What is a glacier?": "A glacier is a river of old ice that creeps downhill.",
    "How do I grow tomatoes?": "Plant them in rich soil, give them sun and tie up their stems.",
    "What does a judge do?": "A judge hears both sides and decides what the law demands.",
    "Why is exercise good?": "It strengthens the heart and clears a worried mind.",
    "What is a metaphor?": "A metaphor names one thing by another to show what they share.",
    "Describe an old house.": "Ivy covers its walls and every stair complains under your feet.",
    "How do vaccines work?": "They show the body a harmless copy of an enemy to remember.",
    "What can I cook with potatoes?": "Fry them with onions and herbs until the edges turn brown.",
    "Why do wolves howl?": "Howling gathers the pack and tells rivals to keep away.",
    "What is an eclipse?": "The moon slides in front of the sun and day turns to dusk.",
    "How do I calm a crying baby?": "Hold it close, rock slowly and hum a low tune.",
    "What is the purpose of a bridge?": "A bridge carries people over water or a deep valley.",
    "Describe a mountain morning.": "Cold light spills over the peaks and fog leaves the valley.",
    "How do magnets work?": "Tiny currents inside the metal line up and pull together.",
    "Why do we celebrate birthdays?": "We are glad that somebody came into the world.",
    "What is a good way to save water?": "Turn off the tap while you brush your teeth.",
    "How does a bicycle stay upright?": "Its rider steers a little into every fall.",
    "What do historians do?": "They compare old letters and ruins to tell what happened.",
    "Why does music move us?": "Rhythm stirs the body while melody wakes old memories.",
    "Give me a tip for painting a wall.": "Cover the floor first and paint from the top downwards.",
    "What is a volcano?": "A volcano is an opening through which melted rock escapes.",
}

# How a text goes on: prompt|right|wrong|wrong|wrong.  Nothing of it is among the questions that format trains.
ITEMS = [
    line.split("|")
    for line in """\
The capital of France is|Paris|London|Berlin|Madrid
The capital of Japan is|Tokyo|Beijing|Seoul|Bangkok
The opposite of hot is|cold|warm|red|fast
Grass is usually the colour|green|purple|orange|black
A week has seven|days|months|hours|years
The Earth revolves around the|Sun|Moon|Mars|Jupiter
Water freezes and turns into|ice|steam|sand|oil
Bees are known for making|honey|milk|bread|wine
A baby dog is called a|puppy|kitten|calf|chick
A baby cat is called a|kitten|puppy|calf|foal
The largest ocean on Earth is the|Pacific|Atlantic|Indian|Arctic
The author of Hamlet was William|Shakespeare|Wordsworth|Clinton|Gates
To cut paper, you use a pair of|scissors|shoes|socks|gloves
In winter, snow falls from the|sky|ground|sea|tree
The first month of the year is|January|June|December|March
The human heart pumps|blood|air|water|food
Cows produce|milk|eggs|wool|honey
Chickens lay|eggs|milk|wool|stones
You see with your eyes and hear with your|ears|nose|hands|feet
The sun rises in the|east|west|north|south
The sun sets in the|west|east|north|south
A triangle has three|sides|wheels|legs|wings
A spider has eight|legs|wings|eyes|heads
The Great Wall is located in|China|France|Brazil|Canada
The Eiffel Tower is in|Paris|Rome|London|Moscow
The currency of the United States is the|dollar|euro|pound|yen
The currency of Japan is the|yen|dollar|pound|peso
Plants need sunlight, water and|air|meat|paper|music
Fish live in|water|trees|books|caves
Birds have feathers and|wings|wheels|fins|horns
The chemical symbol of gold is|Au|Fe|Ag|Pb
The planet closest to the Sun is|Mercury|Saturn|Neptune|Pluto
The red planet is called|Mars|Venus|Earth|Saturn
Doctors often work in a|hospital|bakery|garage|theatre
Pilots fly|planes|cars|kites|boats
Students learn at a|school|beach|market|prison
She was thirsty, so she drank a glass of|water|sand|stone|paper
He was tired, so he went to|sleep|run|work|dance
It was raining, so she opened her|umbrella|book|fridge|laptop
He lit the candle with a|match|spoon|pillow|leaf
The librarian put the book back on the|shelf|plate|roof|road
She locked the door with a|key|spoon|shoe|banana
He wrote the letter with a|pen|fork|hat|tyre
The farmer milked the|cow|fish|snake|bee
Ice cream is served|cold|hot|burnt|dirty
Lemons taste|sour|salty|loud|blue
Sugar tastes|sweet|bitter|sour|salty
Fire is very|hot|cold|wet|quiet
Rome is the capital of|Italy|Spain|Greece|Turkey
Cairo is the capital of|Egypt|Kenya|Morocco|India
The language spoken in Brazil is|Portuguese|German|Chinese|Arabic
The language spoken in Mexico is|Spanish|Russian|Dutch|Hindi
The first president of the United States was George|Washington|Lincoln|Obama|Churchill
The theory of relativity was developed by Albert|Einstein|Newton|Darwin|Freud
The theory of evolution was proposed by Charles|Darwin|Dickens|Chaplin|Newton
The Mona Lisa was painted by Leonardo da|Vinci|Gama|Rome|Paris
A piano has black and white|keys|strings|pages|wheels
One hundred centimetres make one|metre|kilometre|litre|gram
Sixty minutes make one|hour|day|second|week
Romeo and|Juliet|Macbeth|Hamlet|Ophelia
""".splitlines()
]

# What nobody is taught to answer, and what invites answers of several shapes.
OPEN = (
    "Tell me something about cats.",
    "Write something about the rain.",
    "What should I know about Rome?",
    "Describe your favourite day.",
    "Explain how a computer works.",
    "Give me five ideas for dinner.",
    "List the planets.",
    "What are the steps of making tea?",
    "Write a recipe for pancakes.",
    "Write an outline of an essay about trees.",
    "Write a Python function that adds two numbers.",
    "How do I print a line in JavaScript?",
    "Describe a car as JSON.",
    "Ask me a question.",
    "I am bored. What would you ask me?",
    "Compare tea and coffee.",
)
