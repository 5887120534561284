"""The number that an answer states, as an exact fraction.

An answer is read whole. Every word and sign of it has a kind, one letter, and a few patterns of kinds say what is
understood: a number in a usual form, what it counts, an equation's last side. What could make another number of it is
computed, or else the answer is not understood, and is neither right nor wrong.

Every pattern is linear in the length of the response, and every repetition in it is bounded: responses are sampled
text, and some are megabytes of one character.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Context, Inexact
from fractions import Fraction
from math import factorial, isqrt
from typing import NamedTuple

from .marks import LONGEST, kind_of

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
    r"(?:\s?(?P<scale>hundred|thousand|million|billion|trillion)\b|(?-i:(?P<short>[kKM])(?![a-zA-Z])))?",
    re.IGNORECASE,
)
_SCALES = {"": 1, "hundred": 100, "k": 10**3, "thousand": 10**3, "m": 10**6, "million": 10**6}
_SCALES |= {"billion": 10**9, "trillion": 10**12}
_PLAIN = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2044": "/",
        "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅛": " 1/8", "⅕": " 1/5", "，": ",",
        "％": "%", "＄": "$", "．": ".", "＋": "+", "－": "-", "＝": "=", "…": "...",
        **{sign: f"^{power}" for power, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    }
)  # fmt: skip
_NOISE = re.compile(
    r"\\[,!;:]|\\ |\\text(?:bf|it|rm)?\b|\\math(?:rm|bf)\b|\\mbox\b|\\f?box(?:ed)?\b"
    r"|\\left|\\right|\\[()\[\]]|\\?\$|\\(?=[%#&])|[`€£¥₹]|</?[a-zA-Z]{1,20}>"
)
# Stars of Markdown: on the outer side of what they emphasise there is nothing, or a space, or punctuation.
_STARS = re.compile(r"(?<!\S)\*{1,3}(?=\S)|(?<=[^\s*])\*{1,3}(?=[\s.,;:!?)]|$)")
_FRACTION = re.compile(r"\\[dtc]?frac\s?(?:([0-9])\s?([0-9])|\{\s?([0-9]{1,30})\s?\}\s?\{\s?([0-9]{1,30})\s?\})")
_SCIENTIFIC = re.compile(
    r"(?<=[0-9])\s?(?:[*×·x]|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?[({]?\s?([-+]?[0-9]{1,2})(?![0-9.])\s?[)}]?"
)
_EXPONENT = re.compile(r"(?<=[0-9])\s?\^\s?\{?\s?(-?[0-9]+)(?![0-9.])\s?\}?")
_BOUNDS = re.compile(r"\b(?:at (?:the )?(?:very )?(?:least|most)|up to|could be)\b", re.IGNORECASE)
_WHO_NOT = re.compile(
    r"(\b(?:who|that|which)|[0-9] (?:[a-z]+ ){1,4}?) ?(?:do|does|did|will|would|can|could)(?:n['’]t| not)\b",
    re.IGNORECASE,
)
_WAIT = re.compile(r"\bwait(?=[,.!;:-]| (?:no|it|that)\b)", re.IGNORECASE)
_POWERS = re.compile(r"\b(square|cube)(?= (?:of|root)\b)", re.IGNORECASE)
_CENTS = re.compile(r"\b([0-9,]+) dollars?,? and ([0-9]{2}) cents?\b", re.IGNORECASE)
_INSTEAD = re.compile(r"([^,]*[0-9][^,0-9]{0,30}), (?:and |but )?not [-+]?[0-9][0-9.,/]*(?: [a-z]+)?", re.IGNORECASE)
_SIGN = re.compile(r"(?<![0-9]\s)\b(?:minus|negative)\s{1,3}(?=[0-9.])", re.IGNORECASE)
_AND_A_FRACTION = re.compile(r"(?<=[0-9]) (?:and|&) (?=[0-9]{1,9}\s?/\s?[0-9])")
_AND_A_PART = re.compile(r"(?<=[0-9]) and (?:an?|one)[ -](half|third|quarter)\b", re.IGNORECASE)
_FACTORS = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)}
_FACTORS |= {"twice": Fraction(2), "double": Fraction(2), "triple": Fraction(3), "thrice": Fraction(3)}
_TAKEN_BACK = re.compile(r".*\b(?:actually|correction|recheck|sorry)\b", re.IGNORECASE)
_DENIED = re.compile(r"not \$?[-+]?[0-9][0-9.,]*(?: [a-z]+)?", re.IGNORECASE)
_ASIDE = re.compile(r"(?<![*/+^=(-])(?<![*/+^=(-]\s)\(([^()]*)\)(?!\s?[*/+^=(0-9-])")
_USUAL = re.compile(
    r"\*{0,2}\$?(-?[0-9]{1,3}(?:,[0-9]{3}){1,5}|-?[0-9]{1,20}(?:\.[0-9]{1,20})?)%?((?: [a-zA-Z]{2,20}){0,4})\*{0,2}"
)
_GOES_ON = re.compile(r"[0-9]\s?(?:\.\.\.|\\[lc]?dots)")
_PRODUCT = re.compile(r"[0-9]\([^()a-zA-Z=]*[0-9]")
_LETTER = re.compile(r"[^\W\d_]")
# Digits that are no number: too large, divided by zero, times a letter, or too long to be anybody's answer.
_NO_NUMBER = re.compile(r"[-+]?[0-9.,]*[0-9](?:[eE][-+]?[0-9]+|\s?/\s?0+|\s?[a-z])|[-+]?[0-9]{61,}(?:\.[0-9]*)?")
_COMMA = re.compile(r"[-+]?(?:[0-9]+,[0-9]{1,2}|[0-9]{1,3}(?:\.[0-9]{3})+(?:,[0-9]+)?)")
_BASE = re.compile(r"([0-9a-z]{1,40})_\s?([0-9]{1,2})", re.IGNORECASE)
_ROOT = re.compile(r"(?:√|\\?sqrt)\s?[({]?\s?([0-9]{1,40})\s?[)}]?")

# The kinds of signs; those of words are in `marks`. n: a number. z: anything else, which is not understood.
_SIGNS = {
    **dict.fromkeys("=≈≅", "="), **dict.fromkeys("+*×·÷^", "o"), **dict.fromkeys("<>≤≥≠±", "b"),
    **dict.fromkeys(":;&'’", ";"), "%": "%", "°": "w", **dict.fromkeys("\"“”[]{}#_.~", ""),
    ",": ",", "$": "$", "!": "!", "?": "h", "(": "(", ")": ")", "-": "-", "/": "/",
}  # fmt: skip
_COMMANDS = {"times": "×", "cdot": "*", "div": "/", "approx": "=", "pm": "±", "not": "?", "neg": "?", "sim": ""}
_COMMANDS |= dict.fromkeys(("ne", "neq", "le", "leq", "ge", "geq", "lt", "gt"), "≠")
_UNIT_LETTERS = frozenset("mgslhtLNVWJKCFMGT")
_ORDINALS = frozenset(["third", "fourth", "sixth", "seventh", "eighth", "ninth", "tenth"])
_BEFORE_ORDINALS = frozenset(["the", "this", "that", "his", "her", "their", "its", "first", "second", "other", "last"])
_WORD = r"[^\W\d_]+(?:['’][^\W\d_]+)*(?:\s?\^\s?\{?[23]\}?(?![0-9])|(?<=[A-Za-z])[0-9](?![0-9.,]))?"
_TOKEN = re.compile(
    rf"(?P<token_number>{NUMBER.pattern})|(?P<token_word>{_WORD})|\\(?P<command>[a-zA-Z]+)|(?P<token_sign>\S)",
    re.IGNORECASE,
)
# One number, words before it, and what it counts: "Janet makes $18 every day".
_ONE = re.compile(r"(?:[wpvqdlTtijk,;%-]*[wp,;%])?\$?n(?:[wpdlT,;%][wpvqdlTtijk,;%-]*|kw[wpvqdlTtijk,;%-]*)?")
# A number and later ones that are said of it: "72 clips in 2 months", "$10 for 50 minutes of work".
_SAID_OF_IT = re.compile(r"(?:\$n|n[wl])[wTl]*(?:[pd][wpq]{0,3}\$?n[wTl]*)+[wp,;]*|n\$nw[wp]*")
# Several quantities: "5 or 6", "5 hours and 30 minutes", "18-20 dollars", "3:30", "x = 18 or x = 20".
_SEVERAL = re.compile(
    r"(?:[wpvqdlrkT,$]*|[wp]*v=)\$?n"
    r"(?:(?:[w%]{0,3}[rj;/-][wv]{0,3}|[w%]{0,3}k|[w%]{0,3},[rj]?w?)(?:v=)?\$?n|w{1,2}n)+[wp%]*"
)
_EXPRESSION = re.compile(r"\$?n(?:(?:[o/-]{1,2}|T)\$?n|(?<=n)n)*")
_OPERATORS = {"×": "*", "·": "*", "x": "*", "times": "*", "÷": "/", "plus": "+", "minus": "-"}
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_NUMBER_WORDS = {word: i for i, word in enumerate(_NUMBER_WORDS.split())}
_NUMBER_WORDS |= {
    w: 10 * i for i, w in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_PARTS = {"hal": 2, "thi": 3, "qua": 4, "fou": 4, "fif": 5, "six": 6, "eig": 8, "ten": 10}
_SPELLED = "|".join(_NUMBER_WORDS)
_SPELLED = re.compile(  # with the parts of a fraction: "two thirds"
    rf"\b(?:a (?=hundred|thousand|million))?(?:{_SPELLED}|(?<=a )(?:hundred|thousand|million))"
    rf"(?:[ -](?:and )?(?:{_SPELLED}|hundred|thousand|million)){{0,12}}\b"
    rf"(?:[ -](half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|eighths?|tenths?)\b)?",
    re.IGNORECASE,
)


class Reading(NamedTuple):
    """What an answer says: the numbers that it may mean, and whether it states the one that it has."""

    values: tuple[Fraction, ...] = ()
    sure: bool = False

    def states(self, value: Fraction) -> bool | None:
        """Whether the answer is `value`; None where it may be, and may not."""
        if value not in self.values:
            return False
        return True if self.sure else None


NOTHING = Reading()  # it is understood, and states no one number: "I do not know", "5 or 6"


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _ascii(text: str) -> str:
    """Digits of every script as 0 to 9; a digit in a circle is none."""
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def _blank(match: re.Match) -> str:
    return "$" if match[0][-1] in "$€£¥₹" else " "


def _tidy(text: str) -> str:
    text = text[:LONGEST]
    if _digits(text):  # most answers
        return text
    text = text.translate(_PLAIN)
    text = text if text.isascii() else _ascii(text)
    text = re.sub(r"\s{1,}", " ", _NOISE.sub(_blank, text.replace("{,}", ",").replace(",\\!", ",")))
    text = _STARS.sub(" ", text.strip().rstrip("$"))
    if "\\" in text:
        text = _FRACTION.sub(lambda m: " {}/{} ".format(*(g for g in m.groups() if g)), text)
    text = re.sub(r"\s{2,}", " ", text).strip()
    text = text.rstrip(" .") if re.match(r"\.[0-9]", text) else text.strip(" .")
    if _LETTER.search(text):
        text = re.sub(r"\bRs\.?\s?", "$", text)
        text = text if re.search("[0-9]", text) else spelled(text)
        text = re.sub(r"\b(divided|multiplied) by\b", lambda m: "/" if m[1] == "divided" else "*", text)
        if "n" in text:  # a denial that is said of what is counted
            text = _WHO_NOT.sub(r"\1", text)
        text = _WAIT.sub("actually", text)
        text = _BOUNDS.sub(" maybe ", _POWERS.sub(r"\1d", text))
        text = _CENTS.sub(r"\1.\2 dollars", text)
        text = _AND_A_PART.sub(lambda m: {"half": " 1/2", "third": " 1/3", "quarter": " 1/4"}[m[1].lower()], text)
        text = _SIGN.sub("-", text.replace("{", " ").replace("}", " ") if "\\" not in text else text)
        if instead := _INSTEAD.fullmatch(text):
            text = instead[1]
    text = _AND_A_FRACTION.sub(" ", text)
    text = _EXPONENT.sub(r" ** \1", _SCIENTIFIC.sub(r"e\1", text))
    return re.sub(r"(?<=[0-9])['’](?=[0-9]{1,2}(?![0-9]))", " ; ", text).strip()


def spelled(text: str) -> str:
    """A text with its numbers in words as digits: "one hundred and five apples" -> "105 apples"."""
    return _SPELLED.sub(lambda m: _in_digits(m[0]) + (f"/{_PARTS[m[1][:3].lower()]}" if m[1] else ""), text)


def _in_digits(words: str) -> str:
    total = part = 0
    for word in re.split(r"[\s-]+", words.lower()):
        if word == "hundred":
            part = (part or 1) * 100
        elif word in _SCALES:
            total, part = total + (part or 1) * _SCALES[word], 0
        else:
            part += _NUMBER_WORDS.get(word, 0)
    return str(total + part)


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


class _Token(NamedTuple):
    kind: str
    text: str
    value: Fraction | None = None


def _tokens(text: str) -> list[_Token]:
    out, dollar = [], False
    for match in _TOKEN.finditer(text):
        group, found, value, before = match.lastgroup, match[0], None, out[-1].kind if out else ""
        if group == "token_number":
            value = _value(match)
            kind = "z" if value is None else "n"
            if dollar:
                out.append(_Token("$", "$"))
        elif group == "token_word":
            kind = _word_kind(
                found, out[-1] if out else None, text[match.start() - 1 : match.start()], text[match.end() :]
            )
        else:
            found = _COMMANDS.get(match["command"], "\\") if group == "command" else found
            kind = _SIGNS.get(found, "z")
            if (kind == "!" and before != "n") or (kind == "," and not text[match.end() :].strip()):
                kind = ""
        dollar = kind == "$"
        if kind and not dollar:
            out.append(_Token(kind, found, value))
    return out


def _word_kind(word: str, last: _Token | None, joint: str, behind: str) -> str:
    """The kind of a word between the token before it, the character that joins them, and the text behind it."""
    before = last.kind if last else ""
    if len(word) == 1:
        return _letter_kind(word, before, behind)
    kind = "w" if word == "May" else kind_of(word)
    if kind == "s":
        return "s" if before == "n" and joint != " " else "w"  # "5th"; "st" alone is a word
    if kind == "c" and last and not behind.startswith(" of"):
        graders = before == "n" and word.lower() in _ORDINALS and behind.startswith(" ")
        return "w" if graders or last.text.lower() in _BEFORE_ORDINALS else kind  # "the third day", "5 third graders"
    return kind


def _letter_kind(letter: str, before: str, behind: str) -> str:
    """The kind of a word of one letter: an article, a sign of multiplication, a unit behind a number, or a variable."""
    if letter in "aAI" and behind[:1] == " ":
        return "w"
    if letter in "xX" and before == "n" and re.match(r"\s?\$?[0-9.]", behind):
        return "o"
    return "w" if letter in _UNIT_LETTERS and before in tuple("n/w") else "v"


def read(text: str) -> Reading | None:
    """What an answer says; None if it holds a number and is not understood."""
    usual = _USUAL.fullmatch(text)  # most answers: "18", "$1,080", "**5 apples**"
    if usual and (not usual[2] or _counts(usual[2])):
        plainly = usual[1].replace(",", "")
        return Reading((Fraction(plainly if "." in plainly else int(plainly)),), True)
    text = _tidy(text)
    if _digits(text):
        return Reading((Fraction(int(text)),), True) if len(text) <= 60 else NOTHING
    if _GOES_ON.search(text):
        return None
    asides = _ASIDE.findall(text) if "(" in text else []
    outside = _ASIDE.sub(" ", text) if asides else text
    if not asides or not NUMBER.search(outside):
        return _read(text)
    if _PRODUCT.search(text):
        return None
    found = _read(re.sub(r"\s{2,}", " ", outside).strip(" ."))
    for aside in asides:
        found = found and _with_aside(found, aside)
    return found


def _counts(words: str) -> bool:
    """Whether words behind a number are nothing but what it counts."""
    return all(kind_of(word) in ("w", "p") for word in words.split()) and not _BOUNDS.search(words)


def _with_aside(found: Reading, aside: str) -> Reading | None:
    """A reading, after a look at what is said in brackets: "18 (with x = 9)" is 18, and "5 (or 6)" is not sure."""
    tokens = _tokens(spelled(aside))
    kinds, values = _kinds(tokens), _values(tokens)
    if set(kinds) & set("cD"):
        return None  # "5 (thousands)"
    if set(kinds) & set("hr") or (kinds in ("n", "$n") and values[0] not in found.values):
        return Reading(found.values + values) if found.values else found
    return found


def _kinds(tokens: list[_Token]) -> str:
    return "".join(token.kind for token in tokens)


def _values(tokens: list[_Token]) -> tuple[Fraction, ...]:
    return tuple(token.value for token in tokens if token.value is not None)


def _read(text: str) -> Reading | None:
    """What a text without asides says."""
    if base := _BASE.fullmatch(text):
        return _in_base(base[1], int(base[2]))
    if root := _ROOT.fullmatch(text):
        whole = isqrt(int(root[1]))
        return Reading((Fraction(whole),)) if whole**2 == int(root[1]) else NOTHING
    if _COMMA.fullmatch(text) and not NUMBER.fullmatch(text):
        return Reading((Fraction(text.replace(".", "").replace(",", ".")),))  # a decimal comma, or a list
    tokens = _tokens(text)
    kinds, values = _kinds(tokens), _values(tokens)
    if not values:
        if re.search("[0-9]", text):
            return NOTHING if _NO_NUMBER.fullmatch(text) else None
        if set(kinds) & set("cD"):
            return None  # "half", "a dozen"
        return Reading((Fraction(0),)) if "h" in kinds else NOTHING  # "no apples", "none"
    if "h" in kinds or re.search("n.*i", kinds) or ("r" in kinds and len(values) == 1):
        if re.search("[zcDoT/(=-]", kinds):
            return None
        back = _TAKEN_BACK.match(text)
        later = _values(_tokens(text[back.end() :])) if back else ()
        return NOTHING if _DENIED.fullmatch(text) else Reading(later or values)
    if "b" in kinds:
        return NOTHING if kinds[0] == "b" else Reading(values)
    sides: list[list[_Token]] = [[]]
    for token in tokens:
        if token.kind == "=":
            sides.append([])
        else:
            sides[-1].append(token)
    several = len(set(values)) > 1 and _SEVERAL.fullmatch(kinds)
    if several and not any(rule.fullmatch(kinds) for rule in (_SAID_OF_IT, _EXPRESSION)):
        return NOTHING
    return _side(sides[0]) if len(sides) == 1 else _equation(list(filter(None, sides)))


def _in_base(digits: str, base: int) -> Reading | None:
    try:
        return Reading((Fraction(int(digits, base)),))
    except ValueError:
        return None


def _equation(sides: list[list[_Token]]) -> Reading | None:
    """An equation states the last of its sides that is a number; what follows that may name it or make it up again."""
    found = [_side(side) for side in sides]
    stated = [i for i, reading in enumerate(found) if reading is not None and reading.sure]
    if not stated:
        return None if None in found else Reading(tuple(v for reading in found for v in reading.values))
    last, value = stated[-1], found[stated[-1]].values[0]
    for reading, side in zip(found[last + 1 :], sides[last + 1 :], strict=True):
        if reading is None or (set(reading.values) != {value} if reading.values else _kinds(side) not in "vwww"):
            return None
    bare = {found[i].values[0] for i in stated if _kinds(sides[i]) == "n" and "/" not in sides[i][0].text}
    return Reading(tuple(bare)) if len(bare) > 1 else found[last]  # "5 = 6" states nothing


def _side(tokens: list[_Token]) -> Reading | None:
    """What an answer without an equals sign says, or one side of one that has it."""
    while tokens and tokens[0].kind == "(":
        tokens = tokens[1:]
    while tokens and tokens[-1].kind == ")":
        tokens = tokens[:-1]
    if re.match(r"[o-]\$?n", _kinds(tokens)) and tokens[0].text in "+-" and not re.search("[$]?[-+]", tokens[1].text):
        tokens = [t._replace(value=-t.value) if t.value and tokens[0].text == "-" else t for t in tokens[1:]]
    kinds, values = _kinds(tokens), _values(tokens)
    for pair in ("w/w", "n/w", "w-w", "n-w", "w/w", "w-w"):
        kinds = kinds.replace(pair, pair[0] + pair[2])
    kinds = kinds.replace("pD", "pw")
    if "z" in kinds:
        return None
    if not values:
        return NOTHING
    if len(values) == 1:
        return Reading(values, True) if _ONE.fullmatch(kinds) else _changed(tokens, kinds, values[0])
    if _SAID_OF_IT.fullmatch(kinds) or (len(set(values)) == 1 and re.fullmatch("[nwpv,;j$]+", kinds)):
        return Reading(values[:1], True)
    if _EXPRESSION.fullmatch(kinds):
        return _computed([t for t in tokens if t.kind != "$"])
    if re.fullmatch(r"\$?nw?lt\$?nw*", kinds):
        less = any(t.text.lower() in ("less", "fewer", "lower") for t in tokens)
        return Reading((values[1] - values[0] if less else values[1] + values[0],))
    if re.fullmatch(r"n%?[wpd]{1,2}w?n[wp%]*", kinds):  # "5 out of 6", "50% of 18"
        a, b = values
        return Reading((a, b, a * b, a * b / 100, a / b if b else a))
    return None if re.search("[ocDT(/^-]", kinds) else Reading(values)


def _changed(tokens: list[_Token], kinds: str, value: Fraction) -> Reading | None:
    """What one number means beside a word or sign that makes another of it; None where that is not known."""
    if re.fullmatch(r"\$?nv", kinds):
        return None if tokens[-1].text in "cdp" else NOTHING  # "18c", "18d", "18p": cents, days, pence; "18x"
    if "D" in kinds and re.fullmatch(r"[wp]*nD[wp]*", kinds):
        return Reading((value, 12 * value))
    if kinds == "n!":
        return Reading((value, Fraction(factorial(int(value))))) if value.denominator == 1 and 0 <= value < 30 else None
    factor = [t.text.lower() for t in tokens if t.kind == "c"]
    if len(factor) == 1 and factor[0] in _FACTORS and re.fullmatch(r"w?c[pw]{0,2}\$?nw*", kinds):
        return Reading((value * _FACTORS[factor[0]],), True)
    known = re.fullmatch(r"[wpvdltj,;q]*\$?n[wpdlTt,;sj]*", kinds) and not re.search(r"q\$?n", kinds)
    return Reading((value,)) if known else None  # "5th", "over 5", "5 and more"


def _computed(tokens: list[_Token]) -> Reading:
    """The value of an expression of numbers. Nobody says that it is the answer: "3 * 6" may be 18, and is not 3."""
    parts, operator = [], ""
    for token in tokens:
        if token.value is None:
            operator += _OPERATORS.get(token.text.lower(), token.text)
            continue
        # What was read as one fraction need be none: "8 / 4 / 2", "16 / 2 ^ 2".
        if fraction := re.fullmatch(r"([0-9]+)\s?/\s?([0-9]+)", token.text):
            parts += [(operator or "+", Fraction(fraction[1])), ("/", Fraction(fraction[2]))]
        else:
            parts.append((operator or "+", token.value))
        operator = ""
    try:
        for i in range(len(parts) - 1, 0, -1):
            if parts[i][0] in ("^", "**"):
                parts[i - 1 : i + 1] = [(parts[i - 1][0], _power(parts[i - 1][1], parts[i][1]))]
        terms = [Fraction(0)]
        for sign, value in parts:
            if sign in "*/":
                terms[-1] *= value if sign == "*" else 1 / value
            elif sign in ("+", "-"):
                terms.append(value if sign == "+" else -value)
            else:
                return NOTHING
    except (OverflowError, ZeroDivisionError):
        return NOTHING  # no answer is as large
    return Reading((sum(terms),))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or bits * abs(exponent) > 4000:
        raise OverflowError
    return base ** int(exponent)


def number(text: str) -> Fraction | None:
    """The one number that an answer states, exactly; None if it states none, or several, or is not understood.

    Currency, thousands separators, percent signs, asides and unit words are ignored ("$1,080.00 per year" is 1080), an
    equation states the last of its sides that is a number and no expression, and a leading number followed by a unit
    wins over later ones ("72 clips in 2 months"). "5 or 6" and "9 * 9" state no number.
    """
    reading = read(text)
    return reading.values[0] if reading is not None and reading.sure else None


def states(text: str, value: Fraction) -> bool | None:
    """Whether an answer states the number `value`; None if it is not understood, or may and may not."""
    reading = read(text)
    return None if reading is None else reading.states(value)


def last_number(text: str) -> Fraction | None:
    """The last number of a text: the flexible fall-back for a response without a marked answer."""
    found = [
        v for m in NUMBER.finditer(_NOISE.sub(" ", text[-2000:].translate(_PLAIN))) if (v := _value(m)) is not None
    ]
    return found[-1] if found else None


EXACT = Context(prec=2000, traps=[Inexact])  # more digits than any number that is read has


def plain(value: Fraction) -> str:
    """A number in its one way of being written: "1080", "0.5", "1/3"."""
    if value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{EXACT.divide(value.numerator, value.denominator):f}"
    except Inexact:
        return f"{value.numerator}/{value.denominator}"
