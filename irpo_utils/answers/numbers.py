"""The number that an answer states, as an exact fraction.

Every pattern is linear in the length of the response, and every repetition in it is bounded: responses are sampled
text, and some are megabytes of one character.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from .marks import LONGEST

# A number as people write it: thousands separated by commas or spaces, or not at all. A vulgar fraction (3/4, 1 1/2,
# \frac{3}{4}) is one number. Letters may follow (5kg), but no digit, "_" or "." with a digit (52_8 is another number).
_DIGITS = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}|[0-9]{1,3}(?:'[0-9]{3})+"
    r"|[0-9]{1,3}(?: [0-9]{3})+(?![0-9/])|[0-9]+)"
)
NUMBER = re.compile(
    r"(?<![\w.^\\/])(?<![0-9][,'])(?P<sign>[-+])?(?:"
    r"(?:(?P<whole>[0-9]{1,9})[ -]?)?"
    r"(?:\\[dtc]?frac\s?\{\s?(?P<top>[0-9]{1,30})\s?\}\s?\{\s?(?P<bottom>[0-9]{1,30})\s?\}"
    r"|(?<![0-9])(?P<a>[0-9]{1,30})\s?/\s?(?P<b>[0-9]{1,30}))"
    rf"|(?P<decimal>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
    r")(?P<power>[eE][-+]?[0-9]{1,2}(?![0-9.]))?"
    r"(?![0-9_²³¹⁰⁴⁵⁶⁷⁸⁹]|['’][0-9]|x(?![a-zA-Z])|\.[0-9]|,[0-9]|/[0-9]|\s?\^|[eE][-+]?[0-9])"
    r"(?:\s?(?P<scale>thousand|million|billion|trillion)\b|(?-i:(?P<short>[kKM])(?![a-zA-Z])))?",
    re.IGNORECASE,
)
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PLAIN = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2044": "/",
        "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "，": ",", "％": "%", "＄": "$",
        **{chr(0xFF10 + d): str(d) for d in range(10)},
    }
)  # fmt: skip
_NOISE = re.compile(r"\\[,!;:]|\\ |\\text(?:bf|it|rm)?\b|\\math(?:rm|bf)\b|\\left|\\right|\\[()\[\]]|\\?\$|[`€£¥₹]")
# Stars of Markdown: on the outer side of what they emphasise there is nothing, or a space, or punctuation.
_STARS = re.compile(r"(?<!\S)\*{1,3}(?=\S)|(?<=[^\s*])\*{1,3}(?=[\s.,;:!?)]|$)")
_OPERATOR = re.compile(r"\s?[-+*/×÷·^x]{1,3}\s?")
# What ends one quantity and begins another, or hedges: "5 or 6", "5 hours and 30 minutes", "5-6", "3:30",
# "5 minutes 30 seconds".
_SECOND = re.compile(
    r"\b(?:or|and|to|versus|vs|actually|wait|recheck)\b|[-:;&/~'’]\s?[0-9]|,\s"
    r"|^\s?(?!(?:in|for|per|of|after|over|by|at|on|from|with|every|each)\b)[a-zA-Z]+\s[0-9.]+\s?[a-zA-Z]",
    re.IGNORECASE,
)
# What makes a number the beginning of an expression, or part of another number: "18 × 10^3", "7 times 3",
# "half of 18", "> 18".
_UNFINISHED = re.compile(
    r"\s?(?:[*×÷·^+/]\s?\S|(?:times|plus|minus|divided by|multiplied by|less than|more than)\s\$?[0-9]"
    r"|and an? (?:half|third|quarter)\b)",
    re.IGNORECASE,
)
_NOT_ITSELF = re.compile(
    r"√|\\sqrt|[<>≤≥]|^not\b|\b(?:less|more|greater|fewer) than [0-9]"
    r"|\b(?:half|third|quarter|twice|double|triple) (?:of|as|the) [0-9]",
    re.IGNORECASE,
)
_EQUALS = re.compile(r"=|≈|\\approx(?![a-zA-Z])")


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _tidy(text: str) -> str:
    text = text[:LONGEST].translate(_PLAIN)
    if _digits(text):  # most answers
        return text
    text = _NOISE.sub(" ", text.replace("{,}", ",").replace(",\\!", ","))
    text = _STARS.sub(" ", re.sub(r"\s{1,}", " ", text).strip())
    text = re.sub(r"\\[dtc]?frac\s?([0-9])\s?([0-9])", r"\1/\2", re.sub(r"\bRs\.?\s?", " ", text))
    text = re.split(r",? (?:and )?not ", text, maxsplit=1)[0] or text  # "20, not 18"
    text = re.sub(r"\b(?:minus|negative)\s{1,3}(?=[0-9.])", "-", text, flags=re.IGNORECASE)
    outside = re.sub(r"\([^()]*\)", " ", text)  # an aside: "18 (with x = 9)"
    text = outside if NUMBER.search(outside) else text
    return re.sub(r"\s{2,}", " ", text).strip(" .")


def _value(match: re.Match) -> Fraction | None:
    top, bottom = match["top"] or match["a"], match["bottom"] or match["b"]
    if top:
        if not int(bottom):
            return None
        value = Fraction(int(match["whole"] or 0)) + Fraction(int(top), int(bottom))
    else:
        text = match["decimal"].replace(",", "").replace(" ", "").replace("'", "")
        if len(text) > 60:
            return None
        value = Fraction(text) * Fraction(10) ** int((match["power"] or "e0")[1:])
    value *= _SCALES[(match["scale"] or match["short"] or "").lower()]
    return -value if (match["sign"] or "").startswith("-") else value


def _single(text: str) -> Fraction | None:
    """The number of a text without an equals sign; None for none, for several, and for an expression ("9 * 9")."""
    text = re.sub(r"^([-+])\s(?=[0-9.])", r"\1", text.strip())
    found = [(m, v) for m in NUMBER.finditer(text) if (v := _value(m)) is not None]
    if not found:
        return None
    first, value = found[0]
    if _NOT_ITSELF.search(text) or _UNFINISHED.match(text, first.end()):
        return None
    leads = first.start() == 0
    joined = [b["sign"] or _OPERATOR.fullmatch(text[a.end() : b.start()]) for (a, _), (b, _) in pairwise(found)]
    if any(joined[:1] if leads else joined):
        return None
    if len({v for _, v in found}) == 1:
        return value
    return value if leads and not _SECOND.search(text[first.end() :]) else None


def number(text: str) -> Fraction | None:
    """The one number that an answer states, exactly; None if it states none, or several.

    Currency, thousands separators, percent signs, asides and unit words are ignored ("$1,080.00 per year" is 1080), an
    equation states the last of its sides that is a number and no expression, and a leading number followed by a unit
    wins over later ones ("72 clips in 2 months"). "5 or 6" and "9 * 9" state no number.
    """
    text = _tidy(text)
    if _digits(text) and len(text) <= 60:
        return Fraction(int(text))
    sides = _EQUALS.split(text)
    if len(sides) > 2 and any(_SECOND.search(side) for side in sides[1:-1]):
        return None  # two equations: "x = 18 or x = 20"
    values = [value for side in sides if (value := _single(side)) is not None]
    return values[-1] if values else None


def last_number(text: str) -> Fraction | None:
    """The last number of a text: the flexible fall-back for a response without a marked answer."""
    found = [
        v for m in NUMBER.finditer(_NOISE.sub(" ", text[-2000:].translate(_PLAIN))) if (v := _value(m)) is not None
    ]
    return found[-1] if found else None


def plain(value: Fraction) -> str:
    """A number in its one way of being written: "1080", "0.5", "1/3"."""
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    if denominator != 1:
        return f"{value.numerator}/{value.denominator}"
    if value.denominator == 1:
        return str(value.numerator)
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    whole = str(abs(value.numerator) * 10**digits // value.denominator).zfill(digits + 1)
    return f"{'-' if value < 0 else ''}{whole[:-digits]}.{whole[-digits:]}"
