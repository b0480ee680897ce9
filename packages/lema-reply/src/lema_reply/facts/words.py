"""Words, letters and things everybody meets.

Sources: ITU-R M.1677-1 (Morse code); the ICAO spelling alphabet; the Oxford English Dictionary (opposites, young
and groups of animals); the rules of each sport's international federation.
"""

from __future__ import annotations

MORSE = dict(
    zip(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
        [
            ".-",
            "-...",
            "-.-.",
            "-..",
            ".",
            "..-.",
            "--.",
            "....",
            "..",
            ".---",
            "-.-",
            ".-..",
            "--",
            "-.",
            "---",
            ".--.",
            "--.-",
            ".-.",
            "...",
            "-",
            "..-",
            "...-",
            ".--",
            "-..-",
            "-.--",
            "--..",
            "-----",
            ".----",
            "..---",
            "...--",
            "....-",
            ".....",
            "-....",
            "--...",
            "---..",
            "----.",
        ],
    )
)

SPELLING = [
    "Alfa",
    "Bravo",
    "Charlie",
    "Delta",
    "Echo",
    "Foxtrot",
    "Golf",
    "Hotel",
    "India",
    "Juliett",
    "Kilo",
    "Lima",
    "Mike",
    "November",
    "Oscar",
    "Papa",
    "Quebec",
    "Romeo",
    "Sierra",
    "Tango",
    "Uniform",
    "Victor",
    "Whiskey",
    "X-ray",
    "Yankee",
    "Zulu",
]

OPPOSITES = (
    "hot cold,big small,fast slow,early late,high low,light dark,hard soft,wet dry,full empty,old young,rich poor,"
    "strong weak,loud quiet,open closed,near far,deep shallow,thick thin,wide narrow,sharp blunt,smooth rough,"
    "heavy light,happy sad,brave cowardly,generous mean,polite rude,safe dangerous,simple complex,ancient modern,"
    "public private,temporary permanent,visible invisible,victory defeat,arrive depart,increase decrease,accept refuse,"
    "buy sell,push pull,win lose,remember forget,begin end,include exclude,expand contract,ascend descend,"
    "import export,maximum minimum,optimist pessimist,north south,east west,day night,summer winter"
)
OTHER_OPPOSITES = {
    "big": ("little", "tiny"), "small": ("large",), "dark": ("bright",), "wet": ("arid",), "old": ("new",),
    "weak": ("powerful",), "quiet": ("noisy",), "loud": ("silent", "soft"), "open": ("shut",), "near": ("distant",),
    "thin": ("fat",), "narrow": ("broad",), "sharp": ("dull",), "sad": ("joyful",), "happy": ("unhappy",),
    "brave": ("timid", "coward"), "cowardly": ("courageous",), "generous": ("stingy", "selfish"),
    "mean": ("kind", "nice"), "polite": ("impolite",), "safe": ("unsafe",), "simple": ("complicated",),
    "complex": ("easy",), "hard": ("easy",), "soft": ("loud",), "arrive": ("leave",), "depart": ("come",),
    "accept": ("reject", "decline"), "refuse": ("agree",), "begin": ("finish", "stop"), "end": ("start",),
    "expand": ("shrink",), "contract": ("enlarge",), "increase": ("reduce",), "temporary": ("lasting",),
    "modern": ("old",), "ancient": ("new",), "fast": ("sluggish",), "rough": ("even",), "defeat": ("win", "triumph"),
    "victory": ("loss",),
}  # fmt: skip
"""Other right answers to the same question."""

YOUNG = {
    "cow": "calf", "dog": "puppy", "cat": "kitten", "horse": "foal", "sheep": "lamb", "goat": "kid", "pig": "piglet",
    "bear": "cub", "lion": "cub", "duck": "duckling", "goose": "gosling", "swan": "cygnet", "hen": "chick",
    "frog": "tadpole", "kangaroo": "joey", "deer": "fawn", "eagle": "eaglet", "owl": "owlet", "seal": "pup",
    "elephant": "calf", "whale": "calf", "hare": "leveret", "fox": "cub", "butterfly": "caterpillar",
}  # fmt: skip

GROUPS = {
    "wolves": "a pack", "lions": "a pride", "bees": "a swarm", "fish": "a school", "sheep": "a flock",
    "cattle": "a herd", "crows": "a murder", "geese on the ground": "a gaggle", "whales": "a pod", "ants": "a colony",
    "puppies": "a litter", "owls": "a parliament",
}  # fmt: skip
OTHER_GROUPS = {"fish": ("shoal",), "bees": ("hive", "colony"), "sheep": ("herd",), "whales": ("school",)}

SPORTS = {
    # sport: players of a team on the field, what else is true of it
    "football (soccer)": (11, "One of them is the goalkeeper."), "basketball": (5, "A team may change players often."),
    "volleyball": (6, "They rotate when they win the serve back."), "baseball": (9, "One of them is the pitcher."),
    "ice hockey": (6, "One of them is the goalkeeper."), "rugby union": (15, "Eight of them are forwards."),
    "rugby league": (13, "A try is worth four points."), "cricket": (11, "Two of the batting side bat at a time."),
    "handball": (7, "One of them is the goalkeeper."), "water polo": (7, "One of them is the goalkeeper."),
    "field hockey": (11, "One of them is the goalkeeper."), "netball": (7, "Each has a position on the bib."),
    "beach volleyball": (2, "There are no substitutes."), "American football": (11,
    "Teams change for attack and defence."),
    "curling": (4, "Each player delivers two stones an end."), "Australian rules football": (18, "The ground is oval."),
}  # fmt: skip

SPELT = [
    "elephant",
    "umbrella",
    "chocolate",
    "mountain",
    "library",
    "hospital",
    "dictionary",
    "butterfly",
    "kitchen",
    "telephone",
    "calendar",
    "bicycle",
    "adventure",
    "breakfast",
    "carpenter",
    "dinosaur",
    "envelope",
    "fountain",
    "geography",
    "harvest",
    "island",
    "jacket",
    "keyboard",
    "lantern",
    "machine",
    "necklace",
    "october",
    "painter",
    "question",
    "rainbow",
    "scissors",
    "triangle",
    "universe",
    "vegetable",
    "waterfall",
    "yesterday",
    "zebra",
    "ability",
    "balance",
    "captain",
    "daughter",
    "evening",
    "freedom",
    "general",
    "history",
    "imagine",
    "journey",
    "kingdom",
    "language",
    "medicine",
    "neighbour",
    "ordinary",
    "popular",
    "quarter",
    "restaurant",
    "sentence",
    "tomorrow",
    "uniform",
    "village",
    "weather",
    "alphabet",
    "building",
    "computer",
    "decision",
    "electric",
    "festival",
    "gardener",
    "holiday",
    "industry",
    "judgement",
    "knowledge",
    "leather",
    "midnight",
    "notebook",
    "opposite",
    "passenger",
]

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
