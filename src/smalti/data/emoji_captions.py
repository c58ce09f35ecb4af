"""Captions for emoji, from the names of the Unicode consortium: CLDR's through the emoji package, and unicodedata's.

"man technologist: medium-dark skin tone" becomes "a man technologist with medium-dark skin tone" and several more ways
to say it. The grammar is a handful of rules with lists of exceptions; a few captions sound odd.
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from smalti.errors import UserError

_VARIATION_SELECTOR = "\ufe0f"
_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
_TONE_CHARACTERS = re.compile("[\U0001f3fb-\U0001f3ff]")
_HAIR = re.compile(r"^(man|woman|person) (blond|curly|red|white) hair$")
_RELATION = re.compile(r"^(family|kiss|couple with heart) ((?:(?:man|woman|person|girl|boy|adult|child) ?)+)$")
_REGIONAL_INDICATORS = re.compile("^[\U0001f1e6-\U0001f1ff]{2}$")
_TAGGED_FLAG = re.compile("^\U0001f3f4[\U000e0020-\U000e007f]+$")
_PREPOSITIONS = re.compile(r" (?:with|without|in|of|on|and|at|behind|over|facing|holding|showing|pointing|tilted) ")

# Of the names in Unicode's own list: what the glyph was in a black-and-white font, or its place in a code chart.
_MISLEADING = re.compile(r"\b(black|white|squared|circled|latin|ideograph|katakana|heavy|lower left|gua pi mao)\b")
_UNFIT_ALIAS = re.compile(r"[0-9+]|\b(shit|hankey|harambe|fu|sassy|gun|facepunch|no good|couplekiss)\b")

_PEOPLE = frozenset({"man", "woman", "person", "face", "head", "hand", "merperson", "boy", "girl", "child"})
_PLURALS = frozenset({"people", "men", "women", "children"})
_WITHOUT_ARTICLE = frozenset({
    "bacon", "badminton", "bowling", "breast-feeding", "bread", "butter", "camping", "construction", "cooking",
    "custard", "customs", "divide", "fire", "fog", "foggy", "fondue", "garlic", "ice", "infinity", "information",
    "lacrosse", "locked", "luggage", "mate", "minus", "multiply", "oden", "om", "plus", "popcorn", "prohibited", "sake",
    "salt", "soap", "spaghetti", "sushi", "tennis", "thread", "unlocked", "wood", "yarn", "zzz",
    "baggage claim", "canned food", "cooked rice", "currency exchange", "curry rice", "field hockey", "ginger root",
    "high voltage", "horse racing", "hundred points", "ice cream", "ice hockey", "left luggage", "milky way",
    "mount fuji", "nail polish", "non-potable water", "passport control", "ping pong", "potable water",
    "pouring liquid", "rolling on the floor laughing", "shaved ice", "skull and crossbones", "soft ice cream",
    "thumbs down", "thumbs up", "tokyo tower", "vibration mode", "yin yang",
})  # fmt: skip
_NATIONAL = frozenset({"Japanese", "Christmas"})  # capitalised words that begin a common noun
_SPOKEN_WORDS = frozenset({"NEW", "FREE", "COOL", "SOON", "BACK", "TOP", "END", "ON!", "UP!"})
_COUNTRIES_WITH_THE = re.compile(
    r"^(Bahamas|Comoros|Gambia|Maldives|Netherlands|Philippines|Seychelles|Caribbean Netherlands|Isle of Man"
    r"|European Union|U\.S\. .*|United .*|.* Islands|.* Republic|.* Territor(y|ies)|.* Lands)$"
)


@dataclass(frozen=True)
class EmojiDescription:
    """base: the name without skin tones, which all tones of one emoji share. captions: several ways to say it."""

    base: str
    captions: tuple[str, ...]


def plain_sequence(emoji: str) -> str:
    """An emoji without the variation selector, which says "draw it in colour" and changes no picture."""
    return emoji.replace(_VARIATION_SELECTOR, "")


def known_emoji() -> dict[str, Mapping[str, Any]]:
    """Every emoji of the emoji package that Unicode recommends for use (fully qualified) -> its names."""
    try:
        from emoji import EMOJI_DATA, STATUS
    except ImportError:
        raise UserError("the names of emoji need the package emoji: pip install 'smalti[data]'") from None
    return {text: data for text, data in EMOJI_DATA.items() if data["status"] == STATUS["fully_qualified"]}


def _words(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").replace("’", "'").split())


@lru_cache(maxsize=1)
def _by_plain_sequence() -> dict[str, Mapping[str, Any]]:
    return {plain_sequence(text): data for text, data in known_emoji().items()}


@lru_cache(maxsize=1)
def _base_names() -> frozenset[str]:
    return frozenset(_TONE.sub("", _words(data["en"])).lower() for data in known_emoji().values())


def _begins_with_vowel_sound(word: str) -> bool:
    if word.isupper() and word not in _SPOKEN_WORDS:
        return word[0] in "AEFHILMNORSX"  # spelled letter by letter: an SOS button
    lower = word.lower()
    if lower.startswith(("uni", "eu", "one", "utility")):
        return False
    return lower[0] in "aeiou" or lower.startswith(("hour", "honest"))


def _takes_article(name: str) -> bool:
    words = name.split()
    first = words[0]
    if name.lower() in _WITHOUT_ARTICLE or first in ("no", "input") or name.endswith(("o'clock", "-thirty")):
        return False
    if first[0].isupper() and first[1:2].islower() and first not in _NATIONAL:
        return False  # a proper name: Santa Claus, Aquarius
    if first in _PEOPLE:
        return True
    if first in _PLURALS or first.isdigit():
        return False
    head = _PREPOSITIONS.split(name)[0].split()[-1]
    return not (head.endswith("s") and not head.endswith(("ss", "us", "is")))


def with_article(name: str) -> str:
    """A name as English speaks of it: "a" or "an" before what can be counted, nothing before the rest."""
    if not _takes_article(name):
        return name
    return f"{'an' if _begins_with_vowel_sound(name.split()[0]) else 'a'} {name}"


_IRREGULAR_PLURALS = {"man": "men", "woman": "women", "person": "people", "child": "children"}


def _counted(people: list[str]) -> str:
    """["man", "girl", "girl"] -> "a man and two girls"."""
    groups = [(person, people.count(person)) for person in dict.fromkeys(people)]
    return _listed([
        with_article(person) if count == 1 else f"two {_IRREGULAR_PLURALS.get(person, person + 's')}"
        for person, count in groups
    ])  # fmt: skip


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _as_phrase(base: str) -> str:
    """A name of the emoji list as a phrase."""
    if match := _RELATION.match(base):
        people = _counted(match[2].split())
        return {
            "family": f"a family of {people}",
            "kiss": f"{people} kissing",
            "couple with heart": f"{people} with a heart",
        }[match[1]]
    if match := _HAIR.match(base):
        return f"a {match[1]} with {match[2]} hair"
    if match := re.match(r"^(man|woman|person) (bald|beard)$", base):
        return f"a bald {match[1]}" if match[2] == "bald" else f"a {match[1]} with a beard"
    if match := re.match(r"^keycap (.+)$", base):
        return f"a key with the sign {match[1]}"
    return with_article(base)


def _toned(phrase: str, tones: list[str], noun: str) -> str:
    """A phrase with its skin tones: "with medium skin tone", or after a comma where the phrase has a "with"."""
    if not tones:
        return phrase
    tone = f"{_listed(tones)} {noun}{'s' if len(tones) > 1 and noun.endswith('tone') else ''}"
    return f"{phrase}, {tone}" if " with " in phrase else f"{phrase} with {tone}"


def _other_names(plain: str, base: str) -> list[str]:
    """What else the emoji is called: its aliases, as they are, and the name of its character."""
    untoned = _TONE_CHARACTERS.sub("", plain)
    others = _base_names() - {base.lower()}  # "train" for a tram would be another picture's name
    names = [
        alias
        for alias in (_words(alias) for alias in _by_plain_sequence().get(untoned, {}).get("alias", ()))
        if len(alias) > 2 and not _UNFIT_ALIAS.search(alias) and alias not in others
    ]
    character = unicodedata.name(untoned, "").lower() if len(untoned) == 1 else ""
    if character and not _MISLEADING.search(character) and character not in others:
        names.append(with_article(re.sub(r" (sign|symbol)$", "", character)))
    return [name for name in names if name not in (base.lower(), with_article(base.lower()))]


def _flag_captions(country: str) -> tuple[str, ...]:
    country = country.replace(" & ", " and ").replace(" SAR China", "")
    named = f"the {country}" if _COUNTRIES_WITH_THE.match(country) else country
    return f"the flag of {named}", f"flag: {country}", f"an emoji of the flag of {named}", f"{country} flag"


def describe_emoji(emoji: str, data: Mapping[str, Any]) -> EmojiDescription:
    """An emoji's base name and captions, the most natural first. data: its entry in the emoji package's list."""
    name = _words(data["en"])
    tones = _TONE.findall(name)
    base = _TONE.sub("", name)
    plain = plain_sequence(emoji)
    if _REGIONAL_INDICATORS.match(plain) or _TAGGED_FLAG.match(plain):
        return EmojiDescription(f"flag: {base}", _flag_captions(base))
    phrase = _as_phrase(base)
    captions = [
        _toned(phrase, tones, "skin tone"),
        f"{base}: {', '.join(f'{tone} skin tone' for tone in tones)}" if tones else base,
        f"an emoji of {_toned(phrase, tones, 'skin')}",
        f"{base} emoji{', ' + _listed(tones) + ' skin' if tones else ''}",
        f"an icon of {_toned(phrase, tones, 'skin tone')}",
        *(_toned(other, tones, "skin tone") for other in _other_names(plain, base)),
    ]
    return EmojiDescription(base, tuple(dict.fromkeys(captions)))
