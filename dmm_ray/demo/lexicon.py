"""Words of the demo stories: names, places, weather, animals, objects, and the fixed world of facts."""

from __future__ import annotations

from dataclasses import dataclass


def _words(block: str) -> tuple[str, ...]:
    """The words of ``block``."""
    return tuple(block.split())


def _phrases(block: str) -> tuple[str, ...]:
    """The phrases of ``block``, separated by bars."""
    return tuple(" ".join(phrase.split()) for phrase in block.split("|"))


FEMALE = _words(
    """
    Ada Agnes Alba Alice Alma Amara Amy Anna Anita Astrid Aya Beatrix Bella Bess Bianca Bridget Camille
    Carla Carmen Cecily Celia Chloe Clara Cora Daisy Dalia Dana Daphne Della Dina Dora Edith Elena Elisa
    Ella Elsie Emily Emma Erin Esther Eva Faith Fay Fern Fiona Flora Frida Gemma Gina Giulia Grace Greta
    Gwen Hana Hannah Hattie Hazel Heidi Helen Hilda Holly Ida Ines Ingrid Irene Iris Isla Ivy Jane
    Jasmine Jenny Joan Judith Julia Judy Karin Kate Kira Lara Laura Leah Leila Lena Lily Linda Lola
    Lottie Lucy Luna Mabel Maeve Maggie Mara Maria Marta Maya Megan Mina Molly Mona Nadia Nell Nina Nora
    Olga Olive Paula Pearl Penny Petra Pia Polly Priya Rita Rosa Ruby Ruth Sadie Sara Selma Sofia Stella
    Susan Sylvia Tara Tess Thea Tilda Tina Una Vera Violet Wendy Willa Yara Yuki Zara Zoe
    """
)
MALE = _words(
    """
    Aaron Adam Albert Alec Amir Andre Anton Archie Arlo Arthur Axel Barney Basil Ben Bert Bill Boris
    Bruno Caleb Carl Cedric Charlie Chris Clem Colin Conrad Cyril Dan Danny Darius David Dean Dennis
    Diego Dylan Eddie Edgar Eli Elliot Emil Eric Ernest Ethan Ezra Felix Finn Frank Fred Gabriel Gavin
    George Gilbert Gus Hank Harry Harvey Hassan Hector Henry Hugo Ian Igor Isaac Ivan Jack Jacob James
    Jasper Jim Joe Joel John Jonas Josh Jude Julian Karl Ken Kofi Kurt Lars Leo Leon Levi Liam Louis
    Lucas Luis Luke Magnus Marco Mark Martin Matteo Max Miles Milo Mohan Nate Ned Neil Nico Noah Nolan
    Oliver Omar Oscar Otto Owen Pablo Patrick Paul Pedro Pete Philip Quinn Rafael Ralph Ravi Ray Rene
    Robin Roger Roman Rory Rufus Rupert Sam Saul Sean Simon Stan Steve Sven Ted Theo Thomas Tim Toby Tom
    Ulrich Victor Vincent Walter Wes Wade Xavier Yusuf Zack
    """
)
PET_NAMES = _words(
    """
    Biscuit Button Pepper Ginger Clover Pebble Muffin Tumble Whisper Marble Pickle Nutmeg Thistle Domino
    Bramble Cinder Smudge Dumpling Flicker Juniper Maple Noodle Patches Rusty Shadow Snowball Sparrow
    Treacle Velvet Waffle Ziggy Acorn Bandit Comet Freckle Jigsaw Lucky Mango Poppy Socks
    """
)

PLACES = {
    "forest": "in the forest",
    "harbour": "at the harbour",
    "market": "at the market",
    "mill": "by the old mill",
    "bridge": "on the bridge",
    "lake": "beside the lake",
    "meadow": "in the meadow",
    "orchard": "in the orchard",
    "castle": "at the castle",
    "library": "in the library",
    "station": "at the station",
    "garden": "in the garden",
    "lighthouse": "near the lighthouse",
    "beach": "on the beach",
    "cave": "near the cave",
    "school": "outside the school",
    "bakery": "behind the bakery",
    "farm": "on the farm",
    "river": "by the river",
    "hill": "on the hill",
    "island": "on the island",
    "museum": "in front of the museum",
    "inn": "at the inn",
    "valley": "in the valley",
}
# kind -> (clauses in the story's tense, noun phrases)
WEATHER = {
    "rain": (
        (
            "rain [fall.s] on the roofs",
            "it [rain.s] and [rain.s]",
            "the rain [drum.s] on every window",
            "puddles [cover.p] the road",
        ),
        ("the rain", "the wet weather"),
    ),
    "snow": (
        (
            "snow [lie.s] deep on the ground",
            "it [snow.s] without a pause",
            "white snow [cover.s] the fences",
            "soft snowflakes [drift.p] down",
        ),
        ("the snow", "the deep snow"),
    ),
    "sun": (
        (
            "the sun [shine.s] brightly",
            "sunlight [fill.s] the air",
            "the sky [be.s] blue and clear",
            "warm sunshine [lie.s] on the grass",
        ),
        ("the sunshine", "the bright sun"),
    ),
    "wind": (
        (
            "a strong wind [blow.s] from the west",
            "the wind [shake.s] the trees",
            "leaves [fly.p] about in the wind",
            "the wind [howl.s] in the chimneys",
        ),
        ("the wind", "the strong wind"),
    ),
    "fog": (
        (
            "thick fog [hide.s] the path",
            "the fog [be.s] as thick as wool",
            "grey mist [creep.s] over the fields",
            "nobody [can] see far in the fog",
        ),
        ("the fog", "the grey mist"),
    ),
    "storm": (
        (
            "thunder [roll.s] over the hills",
            "a storm [come.s] closer",
            "lightning [flash.s] across the sky",
            "black storm clouds [gather.p]",
        ),
        ("the storm", "the thunder"),
    ),
    "frost": (
        (
            "frost [glitter.s] on the gates",
            "the ponds [be.p] frozen hard",
            "the air [be.s] bitterly cold",
            "ice [cover.s] the buckets",
        ),
        ("the frost", "the bitter cold"),
    ),
    "heat": (
        (
            "the heat [make.s] everyone sleepy",
            "it [be.s] far too hot",
            "the road [be.s] dry and dusty",
            "the air [shimmer.s] with heat",
        ),
        ("the heat", "the hot weather"),
    ),
}
ANIMALS = _words(
    """
    cat dog goat hen duck fox rabbit pony donkey sheep goose crow owl mouse hedgehog squirrel otter frog
    turtle parrot pig calf pigeon badger
    """
)
COATS = _words(
    """
    grey brown black white spotted young old thin fat clever shy noisy lazy friendly sleepy
    """
)

# groups of objects, and the adjectives that go with them
_GOODS = (
    (
        "key bell compass whistle coin trumpet lantern medal spoon thimble",
        "silver golden brass copper iron shiny rusty",
    ),
    (
        "scarf coat hat blanket flag kite cushion ribbon glove shawl",
        "red blue green yellow purple striped woollen silk warm patched",
    ),
    (
        "drum flute box sledge chair puppet violin ladder basket stick",
        "wooden painted carved polished red blue green black",
    ),
    (
        "cup lamp mirror vase bottle bowl necklace marble teapot locket",
        "glass blue white green delicate painted tiny beautiful",
    ),
    (
        "map book letter diary painting calendar notebook songbook",
        "torn secret dusty faded blue precious small",
    ),
)
OBJECTS = {noun: _words(adjectives) for nouns, adjectives in _GOODS for noun in _words(nouns)}

# slot of a template -> the words that may fill it
WORDS = {
    "trait": _words(
        """
        brave shy clever lonely curious cheerful stubborn gentle proud quiet careful lazy honest dreamy
        patient restless polite clumsy kind serious bold tired hungry nervous generous moody sensible
        forgetful tidy noisy daring thoughtful grumpy modest playful reckless calm talkative
        """
    ),
    "glad": _words(
        """
        happy glad proud delighted cheerful thankful overjoyed pleased grateful merry relieved content
        """
    ),
    "sad": _words(
        """
        sad miserable lonely heartbroken bitter gloomy ashamed hopeless unhappy desperate downcast
        disappointed
        """
    ),
    "worried": _words(
        """
        worried afraid nervous troubled upset uneasy frightened puzzled anxious confused tense alarmed
        """
    ),
    "food": _words(
        """
        bread soup apples pancakes cheese honey plums porridge pies carrots chestnuts cherries dumplings
        noodles pears cakes beans walnuts potatoes jam
        """
    ),
    "taste": _words("hot cold sweet fresh stale burnt dried sour warm cheap smoked spicy leftover home-made"),
    "shade": _words("dark pale bright light deep dull"),
    "meanwhile": _phrases(
        """
        this time | without thinking | after some thought | once more | for the first time | in the meantime |
        little by little | as always | right away | just then | somehow | for some reason | on top of that |
        as if in a dream
        """
    ),
    "colour": _words("red blue green yellow black white brown purple grey pink"),
    "count": _words("two three four five six seven eight nine ten twelve twenty"),
    "kin": _words(
        """
        grandmother grandfather uncle aunt cousin mother father teacher brother sister godmother godfather
        nephew niece
        """
    ),
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": _words(
        """
        January February March April May June July August September October November December
        """
    ),
    "spot": _phrases(
        """
        the table | the stairs | an empty barrel | the bed | a pile of leaves | the bench | a loose stone
        | the cupboard | the fence | an old boot | the hay | the carpet | a broken wheel | the sacks | the
        stove | a flower pot | the piano | a heap of straw | the old sofa | a wooden crate | the curtains
        | a rusty bucket | the woodpile | an upturned boat | the bookcase | a mossy log
        """
    ),
    "adv": _phrases(
        """
        slowly | quickly | quietly | carefully | silently | without a word | with great care | as fast as
        possible | calmly | in a hurry | with a frown | politely | gladly | on tiptoe
        """
    ),
    "voice": _phrases(
        """
        softly | loudly | with a sigh | in a low voice | again and again | at last | bravely | sadly |
        quickly | in a whisper | with wide eyes | after a long pause
        """
    ),
    "time": _phrases(
        """
        one morning | one evening | one night | late one afternoon | early in the morning | at dawn | at
        noon | at midnight | after supper | before breakfast | on a quiet day | on a busy day | one day |
        one spring | one autumn day | one winter evening | one summer night | during the holidays | on
        market day | just after sunrise | shortly before dark
        """
    ),
    "later": _phrases(
        """
        later that day | the next morning | an hour later | after a while | before long | that night |
        soon afterwards | the following day | a few minutes later | by the evening | the day after |
        before the next meal | two days later | a week later | towards evening | in the middle of the
        night | early the next day | not long after | on the way home | the same afternoon | at the end of
        the week | without warning | all of a sudden
        """
    ),
    "game": _words("chess cards hide-and-seek marbles draughts football skittles"),
    "job_do": _phrases(
        """
        sweep the floor | water the plants | chop wood | wash the dishes | feed the hens | paint the door
        | carry water | bake bread | pick berries | mend a net | sell eggs | count the sacks | gather
        firewood | clean the windows | dig a ditch | milk the cow | sharpen the knives | polish the boots
        | peel onions | oil the hinges
        """
    ),
    "build": _words("raft tower treehouse bench cart fence windmill tent stage bird-house"),
    "find": _phrases(
        """
        a chest of old coins | a hidden door | a nest of silver eggs | a sword in the mud | a bundle of
        letters | a stone with a face | a tiny boat in a bottle | the bones of a giant fish | a locked
        drawer | a row of strange footprints
        """
    ),
    "contest": _phrases(
        """
        the singing contest | the pumpkin show | the great race | the baking contest | the kite festival |
        the spelling contest | the swimming race | the dancing contest | the drawing prize | the wrestling
        match
        """
    ),
    "barrier": _phrases(
        """
        a fallen tree | a flood | a broken bridge | a landslide | a locked gate | a herd of cows | a deep
        ditch | a wall of brambles
        """
    ),
    "prize": _phrases(
        """
        a silver cup | a bag of gold | a fat cheese | a new saddle | a ticket to the sea | a box of sweets |
        a crown of flowers | a barrel of apples | a fine horse | a painted shield
        """
    ),
    "trouble": _phrases(
        """
        a hole in the roof | a noise in the cellar | a debt of ten coins | a fever | a lost cow | a leaking
        boat | a broken stove | an angry landlord | an empty purse | a sick child
        """
    ),
}

# how a villain is introduced, and referred to afterwards
VILLAINS = (
    ("a stranger", "the stranger"),
    ("a man in a grey coat", "the man"),
    ("a woman with a black scarf", "the woman"),
    ("a cruel sailor", "the sailor"),
    ("a jealous merchant", "the merchant"),
    ("a masked rider", "the rider"),
    ("a greedy pedlar", "the pedlar"),
    ("a bitter old soldier", "the soldier"),
    ("a sly servant", "the servant"),
    ("a ragged woman", "the woman"),
    ("a tall man with a limp", "the man"),
    ("a red-haired smuggler", "the smuggler"),
    ("a drunken coachman", "the coachman"),
    ("an envious painter", "the painter"),
    ("a spiteful old lady", "the old lady"),
    ("a pale young man", "the young man"),
    ("a ruthless captain", "the captain"),
    ("a hooded figure", "the figure"),
    ("a gambler in a silk vest", "the gambler"),
)

TOWNS = _words(
    """
    Oakford Brackwell Fenwick Harlow Stonebury Millbrook Ravensholm Saltmarsh Thornby Underhill Westmere
    Kingsferry Larkfield Ashcombe Dunmore Elmstead
    """
)
JOBS = _words(
    """
    baker blacksmith carpenter doctor fisher gardener judge miller painter potter sailor shepherd tailor
    weaver baron clockmaker
    """
)
POSSESSIONS = _phrases(
    """
    white peacock | black stallion | grand piano | golden harp | sailing ship | red carriage | brass
    telescope | stone tower | rose garden | vineyard | steam engine | glass house | hot-air balloon |
    coffee shop | puppet theatre | music box | pet monkey | silver sword | marble statue | wooden leg |
    tame bear | water mill | printing press | crystal crown | velvet throne | parrot cage | rowing boat
    | stuffed wolf | treasure map | bee garden | cherry orchard | magic carpet
    """
)
_RESIDENTS = _words(
    """
    Aldith Brenna Cressida Drusilla Edda Fenella Griselda Hermia Isolde Jocasta Katinka Lavinia Mirabel
    Nerissa Ottoline Perdita Quenby Rosamund Sidonie Tamsin Ursula Valeria Winifred Xanthe Yolanda
    Zenobia Araminta Bettina Cordula Dulcie Eudora Florimel Ambrose Bartholomew Crispin Dunstan Ebenezer
    Fergus Godfrey Horatio Ignatius Jethro Killian Lazarus Mortimer Nathaniel Obadiah Percival Quentin
    Roderick Septimus Thaddeus Ulysses Valentine Wilfred Xander Yorick Zebedee Aloysius Benedict
    Cuthbert Dashiell Erasmus Fabian
    """
)


@dataclass(frozen=True)
class Resident:
    """One of the 64 residents of the fixed world; the facts about them are the same in every story.

    ``lives_in``, ``owns`` and ``works_as`` are the objects of those relations (``owns`` without its article).
    """

    name: str
    gender: str
    lives_in: str
    owns: str
    works_as: str


RELATIONS = ("lives_in", "owns", "works_as")
WORLD = tuple(
    Resident(
        name=name,
        gender="female" if i < 32 else "male",
        lives_in=TOWNS[(11 * i + 5 * (i // 16) + 3) % 16],
        owns=POSSESSIONS[(19 * i + 7 * (i // 32)) % 32],
        works_as=JOBS[(7 * i + 3 * (i // 16)) % 16],
    )
    for i, name in enumerate(_RESIDENTS)
)
