"""From a generated text to the answer it gives, and whether it is right: as the paper and LLM-Adapters read them.

A text without an answer gives an empty one, which is wrong. Knows texts, nothing of models or files.
"""

import math
import re

TRIGGER = "the correct answer is "  # what a commonsense answer begins with, in training and in reading
TOLERANCE = 0.001  # how far a number may be off
_NUMBER = re.compile(r"-?\d+\.?\d*")
_LETTER = re.compile(r"[A-E]")


def choice(text: str) -> str:
    """What stands behind "the correct answer is", and nothing if these words are not there.

    >>> choice("the correct answer is answer2"), choice("answer2")
    ('answer2', '')
    """
    _, found, rest = text.partition(TRIGGER)
    return rest.strip() if found else ""


def last_number(text: str) -> str:
    """The last number of a text, its thousands written without commas.

    >>> last_number("3 + 4 = 7, so she pays $1,007.")
    '1007.'
    """
    found = _NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else ""


def first_letter(text: str) -> str:
    """The first capital letter from A to E, wherever it stands, in a word too: that is the published rule.

    >>> first_letter("so it is (C)."), first_letter("Anna pays (C).")
    ('C', 'A')
    """
    found = _LETTER.search(text)
    return found[0] if found else ""


def is_number(answer: str) -> bool:
    """Whether an answer is a finite number.

    >>> is_number("18.0"), is_number("C"), is_number("nan")
    (True, False, False)
    """
    try:
        return math.isfinite(float(answer))
    except ValueError:
        return False


def result(text: str, answer: str) -> str:
    """The answer that a worked calculation gives: a number if the right answer is one, else a letter."""
    return last_number(text) if is_number(answer) else first_letter(text)


def same(found: str, answer: str) -> bool:
    """Whether an answer that was read from a text is the right one.

    >>> same("18.", "18.0"), same("answer2", "answer2"), same("", "18")
    (True, True, False)
    """
    if is_number(answer):
        return is_number(found) and abs(float(found) - float(answer)) <= TOLERANCE
    return bool(found) and found == answer.strip()
