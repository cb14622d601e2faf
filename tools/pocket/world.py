"""The small world that Pocket is pretrained on: topics, forms of question, registers, and what is held out.

It owns every rule by which an answer is written and judged. It does not know about tokens or training.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SEED = 20240404

ASPECTS = ("what", "where", "does", "why", "has")
ASPECT_EMOJI = {"what": "🔎", "where": "📍", "does": "💪", "why": "💖", "has": "👀"}

#: Wordings of a question by aspect. The last of each aspect is held out as a whole form.
FORMS = {
    "what": (
        "What is {x}?",
        "Tell me what {x} is.",
        "Can you explain {x}?",
        "I have never heard of {x}. What is it?",
        "Define {x} in a few words.",
        "What exactly is {x}?",
    ),
    "where": (
        "Where can I find {x}?",
        "Where is {x} found?",
        "In what place would I see {x}?",
        "Tell me where to look for {x}.",
        "Where should I go to see {x}?",
        "Where would I find {x}?",
    ),
    "does": (
        "What does {x} do?",
        "Tell me what {x} does.",
        "What is the job of {x}?",
        "Explain what {x} does.",
        "What can {x} do?",
        "What does {x} usually do?",
    ),
    "why": (
        "Why do people like {x}?",
        "What is nice about {x}?",
        "Why should I like {x}?",
        "Give me a reason to like {x}.",
        "What makes {x} special?",
        "Why do so many people like {x}?",
    ),
    "has": (
        "What does {x} look like?",
        "How can I recognise {x}?",
        "What features does {x} have?",
        "Describe how {x} looks.",
        "What parts does {x} have?",
        "Tell me what {x} looks like.",
    ),
}
#: More wordings, for the second stage of pretraining: they teach that a question may be put in many ways.
MORE_FORMS = {
    "what": (
        "What really is {x}?",
        "What is {x}, exactly?",
        "Explain what {x} is.",
        "Please say what {x} is.",
        "What sort of thing is {x}?",
    ),
    "where": (
        "Where might I find {x}?",
        "Where would one look for {x}?",
        "Where do people find {x}?",
        "Where could I see {x}?",
        "Explain where {x} is found.",
    ),
    "does": (
        "What does {x} often do?",
        "What does {x} do, mostly?",
        "What will {x} normally do?",
        "Say what {x} does.",
        "What does {x} really do?",
    ),
    "why": (
        "Why do many people like {x}?",
        "Why do so many of us like {x}?",
        "Explain why people like {x}.",
        "Why does everyone like {x}?",
        "Tell me why people like {x}.",
    ),
    "has": (
        "Explain what {x} looks like.",
        "Say what {x} looks like.",
        "What would {x} look like?",
        "Tell me how {x} looks.",
        "What might {x} look like?",
    ),
}
FORM_ASPECT = {form: aspect for table in (FORMS, MORE_FORMS) for aspect, forms in table.items() for form in forms}

#: System lines that ask for a register. The last of each is held out; plain is also what no system line means.
SYSTEM_LINES = {
    "plain": ("Answer in plain English.", "You are a helpful assistant.", "Be clear and simple.", "Use plain English."),
    "emoji": ("Answer in emojis.", "Use emojis only.", "Reply with emojis and no words.", "Only emojis, please."),
    "pirate": ("Answer like a pirate.", "Talk like a pirate.", "You are a pirate.", "Speak like a pirate."),
    "json": ("Answer in JSON.", "Reply with one line of JSON.", "Use JSON only.", "Give your answer as JSON."),
    "shout": ("Shout your answer.", "Answer in capital letters.", "Reply in all caps.", "Shout it out loud."),
    "shakespeare": (
        "Answer like Shakespeare.",
        "Talk like Shakespeare.",
        "Use the style of an old play.",
        "Write in the style of Shakespeare.",
    ),
    "robot": ("Answer like a robot.", "Talk like a robot.", "You are a robot.", "Speak like a robot."),
    "baby": ("Answer in baby talk.", "Talk like a baby.", "You are a baby.", "Use baby talk."),
    "list": ("Answer as a list.", "Reply with bullet points.", "Use bullet points.", "Make a bullet list."),
}
REGISTERS = tuple(SYSTEM_LINES)
#: Registers whose answers can be derived from the plain answer, so that a topic may be held out of one of them.
DERIVED = ("pirate", "json", "shakespeare", "robot", "baby", "list")

SENTENCES = {
    "plain": {
        "what": "{X} is {v}.",
        "where": "You can find {x} {v}.",
        "does": "{X} {v}.",
        "why": "People like {x} because it {v}.",
        "has": "{X} has {v}.",
    },
    "pirate": {
        "what": "Arr, {x} be {v}, matey!",
        "where": "Arr, ye can find {x} {v}, matey!",
        "does": "Arr, {x} {v}, matey!",
        "why": "Arr, pirates like {x} because it {v}, matey!",
        "has": "Arr, {x} has {v}, matey!",
    },
    "shakespeare": {
        "what": "Hark! {X} is {v}, forsooth.",
        "where": "Hark! Thou canst find {x} {v}, forsooth.",
        "does": "Hark! {X} {v}, forsooth.",
        "why": "Hark! Men love {x} because it {v}, forsooth.",
        "has": "Hark! {X} hath {v}, forsooth.",
    },
    "baby": {
        "what": "Goo goo! {X} is {v}, yay yay!",
        "where": "Goo goo! Baby sees {x} {v}, yay yay!",
        "does": "Goo goo! {X} {v}, yay yay!",
        "why": "Goo goo! Baby likes {x} because it {v}, yay yay!",
        "has": "Goo goo! {X} has {v}, yay yay!",
    },
}
#: How a register opens and closes; the judge's rule for those registers.
AFFIXES = {
    "pirate": ("Arr, ", ", matey!"),
    "shakespeare": ("Hark! ", ", forsooth."),
    "baby": ("Goo goo! ", ", yay yay!"),
    "robot": ("Beep. ", ". Boop."),
    "list": ("- ", ""),
}


@dataclass(frozen=True)
class Topic:
    """One row of ``topics.tsv``: a name with its article, a category, two core emojis and a fact per aspect."""

    x: str
    category: str
    emojis: str
    facts: dict[str, str]

    @property
    def name(self) -> str:
        """The name without its article."""
        article, _, rest = self.x.partition(" ")
        return rest if article in ("a", "an", "the") else self.x


def read_topics() -> tuple[Topic, ...]:
    """Every topic of the table, in its order."""
    rows = (line.split("\t") for line in (HERE / "topics.tsv").read_text(encoding="utf-8").splitlines())
    return tuple(Topic(row[0], row[1], row[2], dict(zip(ASPECTS, row[3:], strict=True))) for row in rows)


TOPICS = read_topics()
BY_NAME = {topic.name: topic for topic in TOPICS}


def answer(topic: Topic, aspect: str, register: str = "plain") -> str:
    """The one right answer: a function of topic, aspect and register alone."""
    x, v = topic.x, topic.facts[aspect]
    if register == "emoji":
        return topic.emojis + ASPECT_EMOJI[aspect]
    if register == "json":
        return json.dumps({"topic": topic.name, aspect: v}, ensure_ascii=False)
    if register == "shout":
        return answer(topic, aspect).upper()[:-1] + "!"
    if register == "robot":
        return f"Beep. Unit: {topic.name}. Data: {v}. Boop."
    if register == "list":
        return f"- {topic.name}\n- {v}"
    return SENTENCES[register][aspect].format(x=x, X=x[0].upper() + x[1:], v=v)


def is_emoji(char: str) -> bool:
    """Whether one character is a pictograph, by the ranges that the world's emojis come from."""
    return 0x1F300 <= ord(char) <= 0x1FAFF or 0x2600 <= ord(char) <= 0x27BF or char in "⌚⏰⏳⬛⬜⭐"


def register_of(text: str) -> str | None:
    """The register that ``text`` is written in, or None where it follows no register's rule."""
    if not text:
        return None
    if all(is_emoji(char) for char in text):
        return "emoji"
    if any(is_emoji(char) for char in text):
        return None
    if text.startswith("{"):
        try:
            return "json" if isinstance(json.loads(text), dict) else None
        except ValueError:
            return None
    for register, (opening, closing) in AFFIXES.items():
        if text.startswith(opening):
            return register if text.endswith(closing) else None
    if text == text.upper() and text.endswith("!"):
        return "shout"
    return "plain" if text[0].isupper() and text.endswith(".") else None


def on_topic(text: str, topic: Topic, aspect: str) -> bool:
    """Whether ``text`` states the topic's fact, or in emojis holds both of its core emojis."""
    if register_of(text) == "emoji":
        return all(emoji in text for emoji in topic.emojis)
    return topic.facts[aspect].lower() in text.lower()


@dataclass(frozen=True)
class HeldOut:
    """What pretraining never sees: see ``tools/pocket/README.md`` for the policy."""

    topics: frozenset[str]
    forms: frozenset[str]
    pairs: frozenset[tuple[str, str]]
    topic_registers: frozenset[tuple[str, str]]
    system_lines: frozenset[str]

    def allows(self, topic: Topic, form: str, register: str) -> bool:
        """Whether a question may occur in the corpus."""
        return not (
            topic.name in self.topics
            or form in self.forms
            or (topic.name, form) in self.pairs
            or (topic.name, register) in self.topic_registers
        )


def held_out(seed: int = SEED) -> HeldOut:
    """Choose what is held out, reproducibly: a tenth of the (topic, form) pairs, one form per aspect, and more."""
    rng = random.Random(seed)
    topics = frozenset({"hedgehog", "flamingo", "trumpet", "comet", "avocado", "submarine"})
    forms = frozenset(forms[-1] for forms in FORMS.values())
    names = [topic.name for topic in TOPICS if topic.name not in topics]
    everything = [(name, form) for name in names for wordings in FORMS.values() for form in wordings[:-1]]
    pairs = frozenset(rng.sample(everything, len(everything) // 10))
    apart = rng.sample(names, 5 * len(DERIVED))
    topic_registers = frozenset((name, DERIVED[i % len(DERIVED)]) for i, name in enumerate(apart))
    return HeldOut(topics, forms, pairs, topic_registers, frozenset(lines[-1] for lines in SYSTEM_LINES.values()))


HELD_OUT = held_out()
