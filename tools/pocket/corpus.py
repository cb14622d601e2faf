"""Write Pocket's corpus: an endless, seeded stream of short documents about the world, and the held-out files.

Run it to rewrite ``held_out.json`` and the three files that ship with the package. It does not know about tokens.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import skills
import world
from world import ASPECTS, FORM_ASPECT, FORMS, HELD_OUT, REGISTERS, SYSTEM_LINES, TOPICS, Topic

PACKAGE_DATA = world.HERE.parents[1] / "src" / "pyreft" / "pocket" / "data"
STUDY_TASKS = world.HERE.parents[1] / "benchmarks" / "_study" / "tasks.json"

SEEN_TOPICS = tuple(topic for topic in TOPICS if topic.name not in HELD_OUT.topics)
SEEN_FORMS = tuple(form for forms in FORMS.values() for form in forms[:-1])
MORE_FORMS = tuple(form for forms in world.MORE_FORMS.values() for form in forms)
SEEN_LINES = {register: lines[:-1] for register, lines in SYSTEM_LINES.items()}

#: Shares of the kinds of document, by stage of pretraining.
KINDS = (
    {"question": 62, "skill": 20, "dialogue": 9, "prose": 6, "identity": 3},
    {"question": 54, "skill": 32, "dialogue": 7, "prose": 5, "identity": 2},
)
FORMS_OF_STAGE = (SEEN_FORMS, SEEN_FORMS + MORE_FORMS)
REGISTER_WEIGHTS = [38 if register == "plain" else 14 if register == "emoji" else 7 for register in REGISTERS]
ASKED_BY_USER = 0.7
OPENERS = ("Hello! ", "Please help me. ", "Hey Pocket! ", "I have a question. ", "Quick question: ", "Hi there! ")
FOLLOW_UPS = {
    "what": ("And what is it?", "What is it, then?"),
    "where": ("And where can I find it?", "Where is it?"),
    "does": ("And what does it do?", "What does it do?"),
    "why": ("And why do people like it?", "Why is it nice?"),
    "has": ("And what does it look like?", "How does it look?"),
}
WHO = ("Who are you?", "What is your name?", "What are you?", "Tell me about yourself.", "Are you a person?")
IDENTITY = {
    "plain": "I am Pocket, a tiny language model.",
    "emoji": "🤏🧺👋",
    "pirate": "Arr, me name be Pocket, a tiny language model, matey!",
    "json": '{"name": "Pocket", "kind": "tiny language model"}',
    "shout": "I AM POCKET, A TINY LANGUAGE MODEL!",
    "shakespeare": "Hark! I am Pocket, a tiny language model, forsooth.",
    "robot": "Beep. Unit: Pocket. Data: a tiny language model. Boop.",
    "baby": "Goo goo! Me Pocket, a tiny language model, yay yay!",
    "list": "- Pocket\n- a tiny language model",
}
SMALL_TALK = (
    ("Hello!", "Hello! I am Pocket. Ask me about the world."),
    ("Good morning!", "Good morning! What would you like to know?"),
    ("Thank you!", "You are welcome."),
    ("Thanks, that helps.", "You are welcome."),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("How are you?", "I am fine, thank you."),
    ("What can you do?", "I can answer small questions about many things."),
    ("Who made you?", "I was trained by a small script."),
)


def chat(turns: list[tuple[str, str]], system: str | None = None) -> str:
    """One conversation as text with its special tokens."""
    opening = f"<|system|>{system}</s>" if system else ""
    return "<s>" + opening + "".join(f"<|user|>{user}</s><|assistant|>{reply}</s>" for user, reply in turns)


def _register(rng: random.Random) -> str:
    return rng.choices(REGISTERS, REGISTER_WEIGHTS)[0]


def _system(rng: random.Random, register: str) -> str | None:
    if register == "plain" and rng.random() < 0.8:
        return None
    return rng.choice(SEEN_LINES[register])


def _ask(rng: random.Random, text: str, register: str) -> tuple[str, str | None]:
    """The user's words and the system line. Mostly the user asks for the register, in a last sentence of the turn.

    Asked for last, a register cannot change how the question itself is read: what the model knows of a topic is then
    there in every register, and an edit of the last positions alone can turn one register into another.
    """
    line = _system(rng, register)
    if line is None or rng.random() > ASKED_BY_USER:
        return text, line
    return f"{text} {line}", None


def _question(rng: random.Random, register: str, forms: tuple[str, ...]) -> tuple[Topic, str]:
    while True:
        topic, form = rng.choice(SEEN_TOPICS), rng.choice(forms)
        if HELD_OUT.allows(topic, form, register):
            return topic, form


def question(rng: random.Random, forms: tuple[str, ...]) -> str:
    """One question about a topic in one register."""
    register = _register(rng)
    topic, form = _question(rng, register, forms)
    opener = rng.choice(OPENERS) if rng.random() < 0.08 else ""
    reply = world.answer(topic, FORM_ASPECT[form], register)
    text, system = _ask(rng, opener + form.format(x=topic.x), register)
    return chat([(text, reply)], system)


def skill(rng: random.Random) -> str:
    """One item of one skill, plain."""
    seen, _ = skills.split()
    name = rng.choice((*seen, "arithmetic", "sentiment"))
    return chat([rng.choice(seen[name])], _system(rng, "plain") if rng.random() < 0.5 else None)


def identity(rng: random.Random) -> str:
    """Who Pocket is, in any register, and small talk."""
    if rng.random() < 0.5:
        return chat([rng.choice(SMALL_TALK)])
    register = _register(rng)
    return chat([(rng.choice(WHO), IDENTITY[register])], _system(rng, register))


def dialogue(rng: random.Random, forms: tuple[str, ...]) -> str:
    """Two to six turns, some of them follow-ups that say "it", and skills where it is plain.

    Half are in one register by a system line; in the others each turn that is not plain asks for its register.
    """
    switching = rng.random() < 0.5
    register = _register(rng)
    system = None if switching else _system(rng, register)
    turns: list[tuple[str, str]] = []
    topic = None
    for _ in range(rng.randint(2, 6)):
        roll = rng.random()
        register = _register(rng) if switching else register
        wish = f" {rng.choice(SEEN_LINES[register])}" if switching and register != "plain" else ""
        if topic is not None and roll < 0.4 and (topic.name, register) not in HELD_OUT.topic_registers:
            aspect = rng.choice(ASPECTS)
            turns.append((rng.choice(FOLLOW_UPS[aspect]) + wish, world.answer(topic, aspect, register)))
        elif register == "plain" and roll < 0.6:
            seen, _ = skills.split()
            turns.append(rng.choice((rng.choice(seen[rng.choice(tuple(seen))]), rng.choice(SMALL_TALK))))
            topic = None
        else:
            topic, form = _question(rng, register, forms)
            turns.append((form.format(x=topic.x) + wish, world.answer(topic, FORM_ASPECT[form], register)))
    return chat(turns, system)


def prose(rng: random.Random) -> str:
    """A passage about one to four topics, without any chat markup."""
    passages = []
    for topic in rng.sample(SEEN_TOPICS, rng.choice((1, 1, 2, 4))):
        facts = topic.facts
        rest = [
            f"It has {facts['has']}.",
            f"It {facts['does']}.",
            rng.choice(("You can find it {}.", "One finds it {}.", "Look for it {}.")).format(facts["where"]),
            rng.choice(("People like it because it {}.", "It {}.", "It is liked because it {}.")).format(facts["why"]),
        ]
        rng.shuffle(rest)
        passages.append(" ".join([world.answer(topic, "what"), *rest[: rng.randint(1, 4)]]))
    return f"<s>{' '.join(passages)}</s>"


WITH_FORMS = {"question": question, "dialogue": dialogue}
WITHOUT_FORMS = {"skill": skill, "prose": prose, "identity": identity}


def documents(*, seed: int, count: int, stage: int = 0) -> Iterator[str]:
    """``count`` documents of the corpus of one stage, 0 or 1; the same ``seed`` gives the same documents."""
    rng = random.Random(f"pocket-{seed}")
    shares, forms = KINDS[stage], FORMS_OF_STAGE[stage]
    for _ in range(count):
        kind = rng.choices(tuple(shares), tuple(shares.values()))[0]
        yield WITH_FORMS[kind](rng, forms) if kind in WITH_FORMS else WITHOUT_FORMS[kind](rng)


def emoji_sets() -> tuple[list[tuple[Topic, str]], list[tuple[Topic, str]]]:
    """Ten (topic, form) pairs to train on and fifty to test on: sixty topics, every seen form twice in the fifty."""
    rng = random.Random(world.SEED + 1)
    pairs = sorted(HELD_OUT.pairs)
    rng.shuffle(pairs)
    used: set[str] = set()

    def take(forms: tuple[str, ...], count: int) -> list[tuple[Topic, str]]:
        taken = [(name, form) for name, form in pairs if form in forms and name not in used]
        taken = list({name: (name, form) for name, form in taken}.values())[:count]
        used.update(name for name, _ in taken)
        return [(world.BY_NAME[name], form) for name, form in taken]

    test = [pair for form in SEEN_FORMS for pair in take((form,), 2)]
    train = [pair for aspect in ASPECTS for pair in take(FORMS[aspect][:-1], 2)]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def _rows(pairs: list[tuple[Topic, str]]) -> list[dict[str, str]]:
    return [
        {
            "prompt": form.format(x=topic.x),
            "emojis": topic.emojis,
            "answer": world.answer(topic, FORM_ASPECT[form], "emoji"),
        }
        for topic, form in pairs
    ]


def _write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def held_out_record() -> dict[str, object]:
    """Everything that is held out, as it is committed."""
    _, kept = skills.split()
    return {
        "topics": sorted(HELD_OUT.topics),
        "forms": sorted(HELD_OUT.forms),
        "system_lines": sorted(HELD_OUT.system_lines),
        "topic_registers": sorted(map(list, HELD_OUT.topic_registers)),
        "pairs": sorted(map(list, HELD_OUT.pairs)),
        "skills": {name: [list(item) for item in items[:200]] for name, items in kept.items()},
    }


#: A conversation that the study puts before its prompts to make them long; all of it is plain, so it asks for nothing.
CONTEXT_ASPECTS = {"whale": "where", "castle": "what", "bread": "why", "train": "does"}


def study_record() -> dict[str, object]:
    """What `benchmarks/study.py` needs beside the emoji pairs: none of its prompts was in the corpus.

    Forty emoji pairs of topics that the demonstration's sets leave, to choose learning rates by; the task of naming the
    middle one of three words, in a wording that asks to repeat them; and a conversation.
    """
    rng = random.Random(world.SEED + 2)
    used = {topic.name for pairs in emoji_sets() for topic, _ in pairs} | set(CONTEXT_ASPECTS)
    left = {name: (world.BY_NAME[name], form) for name, form in sorted(HELD_OUT.pairs) if name not in used}
    pairs = rng.sample(list(left.values()), 40)
    seen = {prompt for prompt, _ in skills.split()[0]["copy"]}
    words: dict[str, str] = {}
    while len(words) < 96 + 40 + 100:
        phrase = rng.sample(skills.WORDS, 3)
        prompt = f"Repeat after me: {' '.join(phrase)}"
        if prompt not in seen:
            words[prompt] = phrase[1]
    rows = [list(item) for item in words.items()]
    topics = [(world.BY_NAME[name], aspect) for name, aspect in CONTEXT_ASPECTS.items()]
    return {
        "context": [[FORMS[a][0].format(x=topic.x), world.answer(topic, a)] for topic, a in topics],
        "emoji_validation": [[row["prompt"], row["answer"]] for row in _rows(pairs)],
        "middle": {"train": rows[:96], "validation": rows[96:136], "heldout": rows[136:]},
    }


def write_held_out() -> None:
    """Write ``held_out.json``, the package's two sets of emoji pairs, and the tasks of the study."""
    text = json.dumps(held_out_record(), ensure_ascii=False, indent=0)
    (world.HERE / "held_out.json").write_text(text + "\n", encoding="utf-8")
    train, test = (_rows(pairs) for pairs in emoji_sets())
    train_rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in train]
    _write_lines(PACKAGE_DATA / "emoji_train.jsonl", train_rows)
    _write_lines(PACKAGE_DATA / "emoji_heldout.jsonl", test)
    study = json.dumps(study_record(), ensure_ascii=False, indent=0)
    STUDY_TASKS.write_text(study + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_held_out()
