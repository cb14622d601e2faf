"""Whether an answer is written in emojis, and in the right ones. It does not know which answer was asked for."""


def is_emoji(char: str) -> bool:
    """Whether one character is a pictograph.

    >>> is_emoji("🐱"), is_emoji("⭐"), is_emoji("c")
    (True, True, False)
    """
    return 0x1F300 <= ord(char) <= 0x1FAFF or 0x2600 <= ord(char) <= 0x27BF or char in "⌚⏰⏳⬛⬜⭐"


def emojis_only(text: str) -> bool:
    """Whether ``text`` holds emojis and, but for white space, nothing else.

    >>> emojis_only("🐱🐾🔎"), emojis_only("🐱 A cat."), emojis_only("")
    (True, False, False)
    """
    shown = "".join(text.split())
    return bool(shown) and all(map(is_emoji, shown))


def has_emojis(text: str, emojis: str) -> bool:
    """Whether ``text`` is in emojis only and holds every one of ``emojis``.

    >>> has_emojis("🐱🐾🔎", "🐱🐾"), has_emojis("🐱🔎", "🐱🐾")
    (True, False)
    """
    return emojis_only(text) and all(emoji in text for emoji in emojis)
