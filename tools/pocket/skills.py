"""The small skills beside the topics: for each, every (prompt, answer) item, and which items are held out.

An item's answer is exact, so that a skill can be scored by equality. It does not know about registers or tokens.
"""

import random
import zlib
from functools import cache

import world

Item = tuple[str, str]

#: Lists of words by name: single words, or pairs such as ``hot cold``.
LISTS = {
    name: tuple(cells)
    for name, *cells in (
        line.split("\t") for line in (world.HERE / "words.tsv").read_text(encoding="utf-8").splitlines()
    )
}
WORDS = LISTS["words"]
REVIEWS = (
    "The {n} was {a}.",
    "What {an} {a} {n}!",
    "I found the {n} {a}.",
    "Our {n} was really {a}.",
    "A truly {a} {n}.",
)
AFTER = {
    "positive": ("", " I loved it.", " I would come again.", " I smiled all day.", " Well done!"),
    "negative": ("", " I hated it.", " I want my money back.", " Never again.", " What a waste of time."),
}
KINDS = ("animal", "food", "tool", "vehicle", "plant", "place")


def _pairs(name: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in (cell.split() for cell in LISTS[name])]


def _seen_topics() -> list[world.Topic]:
    return [topic for topic in world.TOPICS if topic.name not in world.HELD_OUT.topics]


def _arithmetic() -> list[Item]:
    items = []
    for a in range(21):
        for b in range(21):
            items += [(f"What is {a} plus {b}?", str(a + b)), (f"{a} + {b} =", str(a + b))]
            if a >= b:
                items += [(f"What is {a} minus {b}?", str(a - b)), (f"{a} - {b} =", str(a - b))]
    return items


def _compare() -> list[Item]:
    pairs = [(a, b) for a in range(51) for b in range(51) if a != b and (a + b) % 2]
    bigger = [(f"Which number is bigger, {a} or {b}?", str(max(a, b))) for a, b in pairs]
    return bigger + [(f"Which number is smaller, {a} or {b}?", str(min(a, b))) for a, b in pairs]


def _sentiment() -> list[Item]:
    items = []
    for label, adjectives in (("positive", LISTS["good"]), ("negative", LISTS["bad"])):
        for adjective in adjectives:
            for thing in LISTS["things"]:
                for review in REVIEWS:
                    for after in AFTER[label]:
                        a = "an" if adjective[0] in "aeu" and adjective != "useless" else "a"
                        text = review.format(n=thing, a=adjective, an=a)
                        items.append((f"Is this review positive or negative? {text}{after}", label))
    return items


def _words() -> dict[str, list[Item]]:
    return {
        "uppercase": [(f"Write the word {w} in capital letters.", w.upper()) for w in WORDS],
        "spell": [(f"Spell the word {w}.", "-".join(w)) for w in WORDS],
        "reverse": [(f"Spell the word {w} backwards.", "-".join(reversed(w))) for w in WORDS if len(w) <= 5],
        "first_letter": [(f"What is the first letter of {w}?", w[0]) for w in WORDS],
        "last_letter": [(f"What is the last letter of {w}?", w[-1]) for w in WORDS],
        "count": [(f"How many words: {' '.join([w] * n)}?", LISTS["numbers"][n]) for w in WORDS for n in range(1, 8)],
    }


def _copy(rng: random.Random) -> list[Item]:
    phrases = [" ".join(rng.sample(WORDS, rng.randint(2, 4))) for _ in range(3000)]
    return [(f"Repeat after me: {phrase}", phrase) for phrase in phrases]


def _last_word(rng: random.Random) -> list[Item]:
    phrases = [rng.sample(WORDS, rng.randint(2, 4)) for _ in range(3000)]
    items = [(f"What is the last word of: {' '.join(p)}?", p[-1]) for p in phrases[:1500]]
    return items + [(f"What is the first word of: {' '.join(p)}?", p[0]) for p in phrases[1500:]]


def _odd_one_out(rng: random.Random) -> list[Item]:
    topics = [topic for topic in _seen_topics() if topic.category in KINDS]
    items = []
    while len(items) < 4000:
        odd, same = rng.sample(topics, 2)
        if odd.category != same.category:
            others = [t for t in topics if t.category == same.category and t is not same]
            trio = rng.sample([odd, same, rng.choice(others)], 3)
            items.append((f"Which is the odd one out: {', '.join(t.name for t in trio)}?", odd.name))
    return items


def _kinds() -> list[Item]:
    articles = {"animal": "an ", "food": ""}
    items = []
    for topic in _seen_topics():
        if topic.category in KINDS:
            kind = topic.category
            items += [(f"What kind of thing is {topic.x}?", kind), (f"To which group does {topic.x} belong?", kind)]
            items += [(f"Is {topic.x} {articles.get(k, 'a ')}{k}?", "yes" if k == kind else "no") for k in KINDS]
    return items


def _next() -> list[Item]:
    after = [(f"What number comes after {n}?", str(n + 1)) for n in range(99)]
    return after + [(f"What number comes before {n}?", str(n - 1)) for n in range(1, 100)]


def _opposites() -> list[Item]:
    pairs = [pair for a, b in _pairs("opposites") for pair in ((a, b), (b, a))]
    items = _wordings(pairs, "What is the opposite of {}?", "Name the opposite of {}.")
    return items + _wordings(pairs, "Which word means the reverse of {}?")


def _wordings(pairs: list[tuple[str, str]], *wordings: str) -> list[Item]:
    return [(wording.format(a), b) for a, b in pairs for wording in wordings]


@cache
def all_items() -> dict[str, tuple[Item, ...]]:
    """Every item of every skill: ``{skill: ((prompt, answer), ...)}``."""
    rng = random.Random(world.SEED)
    plurals = ("What is the plural of {}?", "One {}, two", "Make the word {} plural.")
    colours = ("What colour is {}?", "Name the colour of {}.", "Which colour comes with {}?")
    skills = {
        "arithmetic": _arithmetic(),
        "compare": _compare(),
        "sentiment": _sentiment(),
        "opposite": _opposites(),
        "plural": _wordings(_pairs("plurals"), *plurals),
        "colour": _wordings(_pairs("colours"), *colours),
        "next": _next(),
        "copy": _copy(rng),
        "pick_word": _last_word(rng),
        "odd_one_out": _odd_one_out(rng),
        "kind": _kinds(),
        **_words(),
    }
    return {skill: tuple(dict(items).items()) for skill, items in skills.items()}


def is_held_out(prompt: str) -> bool:
    """Whether an item is kept out of pretraining: about one in ten, by a hash of its prompt."""
    return zlib.crc32(prompt.encode()) % 10 == 0


@cache
def split() -> tuple[dict[str, tuple[Item, ...]], dict[str, tuple[Item, ...]]]:
    """The items that pretraining sees and those held out, each by skill."""
    seen = {skill: tuple(i for i in items if not is_held_out(i[0])) for skill, items in all_items().items()}
    kept = {skill: tuple(i for i in items if is_held_out(i[0])) for skill, items in all_items().items()}
    return seen, kept
