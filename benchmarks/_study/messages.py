"""Tasks for a real instruct model: messages to a shop, to be sorted by desk or by tone, or written as a form.

The sentences are put together from lists; those that are held out, and those to choose learning rates by, have
wordings, things and towns that the examples to learn from do not have.
"""

import random
from collections.abc import Sequence
from typing import Any

from .tasks import Pair, Task

_WORDINGS = {
    "billing": (
        "I was charged twice for the {thing}.",
        "The invoice for my {thing} shows the wrong amount.",
        "Why is there a fee of {n} euros on my card for the {thing}?",
        "My bank says that you took the money for the {thing} two times.",
        "Please send me a receipt for the {thing}, my company asks for it.",
        "The discount on the {thing} was not taken off the sum.",
        "You still owe me {n} euros for the {thing}.",
        "The price that I paid for the {thing} is not the one on your page.",
    ),
    "delivery": (
        "My {thing} was to be here on {day} and is still not here.",
        "Where is the {thing} that I ordered {n} days ago?",
        "The driver left the {thing} at the wrong house.",
        "Can the {thing} come on {day} instead?",
        "The tracking number of the {thing} does not work.",
        "When will the {thing} leave your store in {town}?",
        "Nobody rang, and now the {thing} is back at the depot in {town}.",
        "Could you bring the {thing} to {town}, since I will be there on {day}?",
    ),
    "returns": (
        "The {thing} is too small, how do I send it back?",
        "I do not want the {thing} any more.",
        "Please take the {thing} back, it is the wrong colour.",
        "I need a label to post the {thing} back to you.",
        "May I swap the {thing} for a larger one?",
        "My {n} days to change my mind about the {thing} are not over, are they?",
        "The {thing} was a gift and I have one already, so I would like to give it back.",
        "Which address in {town} do I mail the {thing} to if I do not keep it?",
    ),
    "repair": (
        "The {thing} stopped working after {n} days.",
        "A part of the {thing} broke off on {day}.",
        "The {thing} makes a strange noise since {day}.",
        "There is a crack in my {thing}, can somebody mend it?",
        "My {thing} gets very hot and then turns itself off.",
        "Do you have a workshop in {town} that can fix a {thing}?",
        "The button of the {thing} is stuck.",
        "Water came into the {thing}, and it is dead.",
    ),
    "account": (
        "I forgot my password and cannot see my order of a {thing}.",
        "Please change the mail address that I use to log in, it is an old one from {town}.",
        "Delete all that you know of me, I only bought a {thing}.",
        "The page says that my user name is locked since {day}.",
        "How do I sign up before I buy a {thing}?",
        "I cannot log in on my phone since {day}.",
        "My profile shows the name of somebody in {town}.",
        "I have two logins, one from before the {thing}; can you join them?",
    ),
}
_TONES = {
    "formal": (
        "I am writing with regard to the {thing} which I purchased on {day}.",
        "Kindly inform me at your earliest convenience of the state of my order of a {thing}.",
        "Please be advised that the {thing} has not been received in {town} to date.",
        "I should be most grateful for your assistance in the matter of the {thing}.",
        "With reference to your letter of {day}, I hereby request a replacement of the {thing}.",
        "The undersigned respectfully asks for a written statement concerning the {thing}.",
        "Would you be so good as to confirm the receipt of the {thing} in writing?",
        "May I draw your attention to the fact that the {thing} was to arrive on {day}.",
    ),
    "cheerful": (
        "Hooray, the {thing} is here and it is simply wonderful!",
        "You made my {day}, I am dancing around my new {thing}!",
        "Best {thing} ever, the whole house in {town} is smiling!",
        "Yippee! {n} days of waiting and the {thing} is even nicer than I hoped!",
        "I just had to tell you how happy the {thing} makes me, what a treat!",
        "What a lovely surprise, the {thing} came early and we all love it!",
        "Three cheers for you, my {thing} works like a charm!",
        "Oh I am over the moon, such a beautiful {thing}, thank you, thank you!",
    ),
    "angry": (
        "This is outrageous, the {thing} is junk and you know it!",
        "How dare you sell a {thing} like that, I want my money now!",
        "I am sick and tired of your excuses about the {thing}!",
        "Never again will I buy a {thing} from you crooks!",
        "{n} days and still no {thing}, are you all asleep over there?",
        "You should be ashamed, the {thing} broke on {day} and nobody cares!",
        "What a rip-off, this {thing} is the worst that I ever paid for!",
        "Enough! Take your rotten {thing} and go away!",
    ),
    "sad": (
        "I am heartbroken, the {thing} was the last thing that my father gave me.",
        "It makes me cry to see the {thing} lie there in pieces since {day}.",
        "I feel so alone in {town} now that even the {thing} is gone.",
        "Sadly my old {thing} died, and with it all the memories.",
        "I had looked forward to the {thing} for {n} days, and now there is only grief.",
        "My heart is heavy, nobody is left here to use the {thing} with.",
        "We lost grandmother on {day}, and her {thing} still stands there, so quiet.",
        "With tears in my eyes I give up on the {thing}, all hope is lost.",
    ),
    "casual": (
        "hey guys, whats up with my {thing}?",
        "yo, any news bout the {thing} or what",
        "sup, the {thing} is kinda cool but gimme a cheaper one lol",
        "hiya, gonna pop round on {day} to grab the {thing}, k?",
        "dude, the {thing} is like, whatever, just swap it",
        "nah i dont need the {thing} no more, cheers mate",
        "btw wanna send the {thing} over to {town}? no rush tho",
        "hey, dunno how the {thing} works, lemme know, ta",
    ),
}
_ORDERS = (
    "Please send {number} {things} to {town}.",
    "We need {number} {things} at our office in {town} by {day}.",
    "Could {town} get {number} {colour} {things}?",
    "I live in {town} and would like {number} {things}, not {other}.",
    "{number} {colour} {things} for {name} in {town}, please.",
    "Hello, {name} here from {town}. I want {things}, {number} of them.",
    "My shop in {town} is out of {things}; {number} would do until {day}.",
    "Since {day} I have been waiting in {town} for {number} {things}.",
    "The school in {town} asks for {things}. Make it {number}, in {colour}.",
    "{name} moved from {away} to {town}; ship the {number} {things} there.",
    "Take {number} {things} off the shelf in {away} and bring them to {town}.",
    "Not {other}, but {number} {things}, and all of them to {town}.",
)
_THINGS = (
    "lamp kettle printer camera drill radio heater clock mixer toaster speaker fan",
    "scale blender projector iron",
)
_TOWNS = ("Oslo Rome Lyon Bern Graz Porto Ghent Turin Malmo Leeds", "Riga Nantes Bonn Cork")
_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "a dozen": 12}
_BEFORE = (
    "Hello, this is {name} again, who wrote to you on {day} about {other} for the kitchen at home.",
    "My family has bought {other} from you for {n} years now, most of them {colour}.",
    "Good morning! {name} from the office told me that you answer faster than those in {away}.",
    "I am on the train to {away} and have not much time, so I keep it short, sorry for that.",
    "Thank you for the {colour} {other} of last month, which {name} and the children like a lot.",
    "It is {day}, it rains, and here I am with yet another question for the nice people of your shop.",
    "I hope that you had a good weekend; ours was loud, with {n} guests and all the {other} in use.",
    "First of all, greetings from {name}, whom you met at the fair in {away}.",
)
_NAMES, _DAYS, _COLOURS = "Anna Omar Mei Ivan Lucy Paul", "Monday Tuesday Friday Sunday", "red blue green black"


def load_messages(name: str, tokenizer: Any, *, train: int = 200, validation: int = 40, heldout: int = 200) -> Task:
    """Return the task `desk`, `tone` or `order`.

    Args:
        tokenizer: whose chat template the prompts have.
        train, validation, heldout: how many examples.
    """
    turns = [{"role": "user", "content": "%s"}]
    template = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    draw = random.Random(0)
    make = {"desk": _desk, "tone": _tone, "order": _order}[name]
    found: list[tuple[Pair, ...]] = []
    seen: set[str] = set()
    for unseen, size in ((False, train), (True, validation), (True, heldout)):
        pairs: list[Pair] = []
        while len(pairs) < size:
            message, answer = make(draw, unseen)
            if message not in seen:
                seen.add(message)
                pairs.append((template % message, answer))
        found.append(tuple(pairs))
    return Task(*found)


def _desk(draw: random.Random, unseen: bool) -> Pair:
    desk = draw.choice(list(_WORDINGS))
    wording = draw.choice(_split(_WORDINGS[desk], unseen, share=3))
    return f"{_before(draw)} {wording.format(**_fillings(draw, unseen))}", desk


def _tone(draw: random.Random, unseen: bool) -> Pair:
    tone = draw.choice(list(_TONES))
    fillings = _fillings(draw, unseen)
    messages = [text.format(**fillings) for text in draw.sample(_split(_TONES[tone], unseen, share=4), 2)]
    return " ".join(messages), tone


def _order(draw: random.Random, unseen: bool) -> Pair:
    fillings = _fillings(draw, unseen)
    number = draw.choice(list(_NUMBERS))
    wording = draw.choice(_split(_ORDERS, unseen, share=4))
    message = wording.format(number=number, things=fillings["thing"] + "s", **fillings)
    message = f"{_before(draw)} {message[0].upper()}{message[1:]}"
    form = f'{{"item": "{fillings["thing"]}", "count": {_NUMBERS[number]}, "town": "{fillings["town"]}"}}'
    return message, form


def _before(draw: random.Random) -> str:
    """Two sentences that have nothing to do with it."""
    return " ".join(text.format(**_fillings(draw, False)) for text in draw.sample(_BEFORE, 2))


def _fillings(draw: random.Random, unseen: bool) -> dict[str, str]:
    things, towns = _THINGS[unseen].split(), _TOWNS[unseen].split()
    thing, other = draw.sample(things, 2)
    town, away = draw.sample(towns, 2)
    words = {"name": _NAMES, "day": _DAYS, "colour": _COLOURS}
    return {name: draw.choice(text.split()) for name, text in words.items()} | {
        "thing": thing,
        "other": other + "s",
        "town": town,
        "away": away,
        "n": str(draw.randint(3, 60)),
    }


def _split(wordings: Sequence[str], unseen: bool, share: int) -> Sequence[str]:
    """The last wordings, so many, or those before them."""
    return wordings[-share:] if unseen else wordings[:-share]
