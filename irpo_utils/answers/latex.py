r"""Whether two mathematical answers written in LaTeX are the same: cheap exact rules first, the symbolic check last.

The rules decide numbers (exactly, as fractions), words, lists, tuples and intervals (element by element); only an
expression that they cannot decide goes to math-verify, in a process of its own with a limit on its time and memory
(`verify`). String equality alone would call about one right MATH answer in twelve wrong.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise

from .marks import boxed_as_said, braced, kind_of
from .numbers import spelled
from .verify import Verifier

LONGEST = 400  # characters of an answer that are compared by more than their letters
_FORMULA = re.compile(r"\$+([^$]+)\$+|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_POWER = re.compile(r"(?:\{\})?\^\s*\{?\s*(?:[23]|\\circ)\s*\}?")  # of a unit before it: $17$ cm$^2$
_BETWEEN = re.compile(r"\s*[,;]?\s*(?:(?:and|or)\s*)?", re.I)  # the formulas of a list
_STATES = re.compile(r"(?:\b(?:is|are|equals|be)|[=:])\s*$", re.I)
_SPACES = re.compile(
    r"(?<!\\)\\[,;:!> ]|\\q?quad\b|\\(?:displaystyle|textstyle|limits)\b|~|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])"
)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal|tt)?|mbox|mathrm|mathbf|mathit|operatorname)\s*\{([^{}]*)\}")
_UNIT_TEXT = re.compile(_TEXT.pattern + r"\s*(?:\^\s*\{?\s*[0-9]\s*\}?)?")
_WORDS = re.compile(r"[a-z][a-z' -]*[a-z]")
# Other words after a number are letters that are multiplied: 5ab.
_UNIT_WORDS = """
    cm mm km in inch inches ft foot feet yd yard yards mi mile miles meter meters metre metres centimeter centimeters
    kilometer kilometers unit units sq square cubic degree degrees deg radian radians
    second seconds sec minute minutes min hour hours hr hrs day days week weeks month months year years
    dollar dollars cent cents pound pounds lb lbs ounce ounces oz gram grams kg kilogram kilograms mph kph
    liter liters litre litres gallon gallons percent
    people students ways times points books marbles socks cubes per
"""
_UNITS = frozenset(_UNIT_WORDS.split())
_FUNCTIONS = re.compile(r"pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|e|infty|infinity|frac|cup|cap|mod|and|or|in|i")
_SHORT_WORDS = frozenset(["yes", "no", "odd", "all"])  # and no products of letters
_NAMES = re.compile(r"alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|omega|infty|infinity|(?:arc)?(?:sin|cos|tan)h?")
_UNIT = re.compile(r"([-+]?[0-9][0-9.,]*)\s*((?:[a-zA-Z]{2,}\s*){1,4}(?:\^\{?[23]\}?)?)")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?")
_RATIO = re.compile(r"([-+]?)(?:\\frac\{([-+]?[0-9]+)\}\{([0-9]+)\}|([0-9]+)/([0-9]+))")
_MIXED = re.compile(r"([-+]?)([0-9]+)(?:\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))")
_PERIODIC = re.compile(r"([-+]?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_SAME = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\leq": "\\le", "\\geq": "\\ge", "\\neq": "\\ne",
    "\\varnothing": "\\emptyset", "\\cdot": "*", "\\times": "*", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\mid": "|",
    "\\pmb": "", "π": "\\pi", "∞": "\\infty", "√": "\\sqrt", "≤": "\\le", "≥": "\\ge", "∪": "\\cup",
    "∅": "\\emptyset",
    "²": "^2", "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "−": "-", "–": "-", "×": "*",
    "·": "*", "°": "", "\\degree": "", "\\%": "", "%": "", "{,}": ",",
}  # fmt: skip
_COMMAND = re.compile(
    "|".join(
        re.escape(k) + (r"(?![a-zA-Z])" if k[1:].isalpha() and k[0] == "\\" else "")
        for k in sorted(_SAME, key=len, reverse=True)
    )
)
_BARE_FRACTION = re.compile(r"\\frac\s*(?:([0-9a-z])\s*([0-9a-z])|([0-9a-z])\s*\{([^{}]*)\}|\{([^{}]*)\}\s*([0-9a-z]))")
_NAME = re.compile(r"[a-zA-Z]\s*=")
_NAMED = re.compile(r"=[a-zA-Z]$")  # 5=x
_NEGATIVE = re.compile(
    r"(?<![0-9}])(\s?)(?:\\(?:text|mbox|mathrm)\s?\{\s?(?:negative|minus)\s?\}|\b(?:negative|minus))\s{0,3}(?=[0-9.\\])"
)
_UNIT_LETTERS = frozenset("mgslhLtJWVKCFN")  # any other letter in \text{} is mathematics: 5\text{i}
# What an answer is not compared by unless the right one has it too: words that change or hedge it, and these.
_BOUND = re.compile(r"\\(?:neq?|leq?|geq?|lt|gt|leqslant|geqslant)(?![a-zA-Z])|[<>≠≤≥]")
_DOUBT = re.compile(
    r"\?|\\(?:not|neg|lnot|mod|pmod|bmod|prime|ldots|cdots|dots)(?![a-zA-Z])|\.\.\.|[0-9]\s?['’](?!\))"
    r"|\b(?:at (?:the )?(?:least|most)|up to|could be|or (?:so|more|less|fewer))\b"
)
_A_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}(?:['’]t)?")
_TOO_LARGE = re.compile(  # a power that is written out nowhere, and is no other expression's value
    r"(?:[2-9]|[0-9]{2,9}|\([^()]{0,40}[a-z][^()]{0,40}\))\^\{?(?:[0-9]{5,}|[2-9]\^\{?[2-9]\^.{1,40}|10\^\{?[0-9]{1,9})\}{0,9}!?"
)


def unwrap(text: str) -> str:
    r"""The mathematics of a marked answer: without `\boxed`, dollar signs or brackets around it, and the full stop."""
    text = text.strip().replace("\\$", "")
    text = boxed_as_said(text) or text
    found = [(m, next(filter(None, m.groups())).strip()) for m in _FORMULA.finditer(text[:2000])]
    found = [(m, inside) for m, inside in found if not _POWER.fullmatch(inside)]
    inside, words = [inside for _, inside in found], _FORMULA.sub(" ", text[:2000])
    if inside and not _changes(words, len(inside)):
        last = found[-1][0]
        if re.search(r"[0-9]", words):
            text += " ?"
        elif all(_BETWEEN.fullmatch(text, one.end(), other.start()) for (one, _), (other, _) in pairwise(found)):
            text = ", ".join(inside)
        else:  # "the value of $x$ is $5$" says 5, and "$x=5$ when $y=2$" nobody knows
            text = inside[-1] if _STATES.search(text[: last.start()]) else f"{text} ?"
    text = _NEGATIVE.sub(r"\1-", re.sub(r"\\[()\[\]]", " ", text) if inside else text)
    return _unbraced(re.sub(r"(?<!\.)\.$", "", text.replace("$", "").strip()).strip())


def _changes(words: str, formulas: int) -> bool:
    """Whether the words around formulas change what these say: "not $5$", "$5$ hundred", "5 and $6$"."""
    if _DOUBT.search(words) or re.match(r"\W*[0-9]", words) or (formulas == 1 and re.search(r"\bor\b", words)):
        return True
    return any(kind_of(word) in tuple("hcDt") for word in _A_WORD.findall(words))


def unclear(text: str, gold: str) -> bool:
    r"""Whether an unwrapped answer holds what may make another one of it, and its gold answer does not.

    Such an answer is not compared: "5 maybe 6", "x \ne 5", "5\text{ hundred}". Words alone are: "no solution".
    """
    if not re.search(r"[0-9=\\]", _TEXT.sub(r" \1 ", text)) or _suspect(gold):
        return False
    if _BOUND.search(text) and not re.search(r"[<>\[(]|\\(?:[lg]eq?|in|cup|infty)(?![a-z])", gold):
        return True
    return _suspect(text)


def _suspect(text: str) -> bool:
    beside = [m.strip() for m in _TEXT.findall(text)]
    plain = _TEXT.sub(lambda m: f" {m[1]} ", text)
    if _DOUBT.search(plain) or any(re.search(r"[0-9]", t) and t != text for t in beside if _TEXT.sub("", text).strip()):
        return True
    words = [w for w in _A_WORD.findall(plain) if len(w) > 2 or w in ("no", "if")]  # mn and bn are products
    return any(kind_of(w) in tuple("hcDti") and (w == "mod" or not _FUNCTIONS.fullmatch(w)) for w in words)


def _unbraced(text: str) -> str:
    while text.startswith("{") and braced(text, 0) == text[1:-1]:
        text = text[1:-1].strip()
    return text


def normal(text: str) -> str:
    """An answer in a common spelling, spaces gone. What is equal is equal; what differs may still be the same."""
    text = unwrap(text)
    text = re.sub(r"(?<=[0-9])(?:\{,\}|,\\!)(?=[0-9]{3})", "", text)  # 5,\!525 and 5{,}525
    text = _COMMAND.sub(lambda m: _SAME[m[0]], _SPACES.sub("", text))
    text = re.sub(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))", "", text)
    text = _BARE_FRACTION.sub(lambda m: "\\frac{{{}}}{{{}}}".format(*(g for g in m.groups() if g is not None)), text)
    text = re.sub(r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}", text)
    text = _TEXT.sub(lambda m: m[1] if len(m[1].strip()) == 1 and m[1].strip() not in _UNIT_LETTERS else m[0], text)
    texts = [m.strip() for m in _TEXT.findall(text)]
    without = _UNIT_TEXT.sub(" ", text).strip()
    if re.search(r"[0-9a-zA-Z]", without) and not any(t.lower() in ("and", "or") for t in texts):
        text = without  # a unit
    else:
        text = _TEXT.sub(lambda m: "," if m[1].strip().lower() in ("and", "or") else m[1], text)
    text = re.sub(r"(?:\s*,)+", ",", re.sub(r"\s+(?:and|or)\s+", ",", text)).strip().rstrip(".,").strip()
    unit = _UNIT.fullmatch(text)
    if unit and all(_counted(word, text[len(unit[1])] == " ") for word in re.findall(r"[a-zA-Z]+", unit[2].lower())):
        text = unit[1]
    if name := _NAME.match(text):
        text = text[name.end() :].strip()
    text = _NAMED.sub("", re.sub(r"(?<=[0-9])_(?:10|\{10\})$", "", text))
    if _WORDS.fullmatch(text.lower()):
        text = spelled(text)
    if _MIXED.fullmatch(text) is None:  # the space of "1 1/2" counts
        text = re.sub(r"\s+", "", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    text = re.sub(r"([\^_])\{([0-9a-zA-Z])\}", r"\1\2", text)
    return text.replace("bmatrix", "pmatrix").strip()


def _counted(word: str, apart: bool) -> bool:
    """Whether a word behind a number is what it counts: a unit, or a longer word that stands `apart` from it."""
    return word in _UNITS or (apart and len(word) > 3 and kind_of(word) == "w" and not _NAMES.fullmatch(word))


def rational(text: str) -> Fraction | None:
    """The value of a normal answer that is one number: an integer, a decimal, a fraction or a mixed number."""
    if len(text) > 100:
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    if ratio := _RATIO.fullmatch(text):
        top, bottom = (ratio[2], ratio[3]) if ratio[2] else (ratio[4], ratio[5])
        value = Fraction(int(top), int(bottom)) if int(bottom) else None
        return -value if value is not None and ratio[1] == "-" else value
    if periodic := _PERIODIC.fullmatch(text):
        whole, fixed, again = (periodic[i] or "" for i in (2, 3, 4))
        value = Fraction(
            int(f"{whole}{fixed}{again}") - int(f"{whole}{fixed}" or 0), (10 ** len(again) - 1) * 10 ** len(fixed)
        )
        return -value if periodic[1] == "-" else value
    if mixed := _MIXED.fullmatch(text):
        top, bottom = mixed[3] or mixed[5], mixed[4] or mixed[6]
        value = int(mixed[2]) + Fraction(int(top), int(bottom)) if int(bottom) else None
        return -value if value is not None and mixed[1] == "-" else value
    return None


def elements(text: str) -> list[str]:
    """A normal answer split at its commas outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def signed(parts: list[str]) -> list[str]:
    r"""A list's elements with `\pm` written out, once with each sign."""
    out = []
    for part in parts:
        several = part.count("\\pm") == 1
        out += [part.replace("\\pm", sign) for sign in "+-"] if several else [part]
    return out


def _bracketed(text: str) -> tuple[str, str, str] | None:
    r"""(opening, inside, closing) of an answer that is one bracket: a tuple, an interval, a set."""
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) + len(closing):
            inside, depth = text[len(opening) : len(text) - len(closing)], 0
            for c in inside:
                depth += (c in "([{") - (c in ")]}")
                if depth < 0:
                    return None
            return opening, inside, closing
    return None


def decide(first: str, second: str) -> bool | None:
    """Whether two normal answers are the same, by the cheap rules; None where only the symbolic check can tell."""
    if first == second:
        return True
    if _TOO_LARGE.fullmatch(first) and "^" not in second:
        return False
    if max(len(first), len(second)) > LONGEST or not first or not second:
        return False
    one, two = rational(first), rational(second)
    if one is not None and two is not None:
        return one == two
    if (one is None) != (two is None):
        letters = re.fullmatch(r"[-+]?[0-9.]*([a-zA-Z]{1,3})", first if one is None else second)
        if letters and not _FUNCTIONS.fullmatch(letters[1].lower()):
            return False  # a product of letters, which math-verify may take for a unit
    if not _SHORT_WORDS.isdisjoint(words := (first.lower(), second.lower())):
        return words[0] == words[1]
    products = [re.fullmatch(r"([-+]?[0-9.]*)([a-zA-Z]{2,3})", t) for t in (first, second)]
    if all(products):
        return products[0][1] == products[1][1] and sorted(products[0][2]) == sorted(products[1][2])  # ab = ba
    if any(_WORDS.fullmatch(t.lower()) for t in (first, second)):
        return first.lower() == second.lower()
    if re.fullmatch(r"\(?[A-Za-z]\)?", first) and re.fullmatch(r"\(?[A-Za-z]\)?", second):
        return first.strip("()") == second.strip("()")  # an option
    bases = [re.findall(r"(?<=[0-9])_([0-9]+|\{[0-9]+\})", t) for t in (first, second)]
    if bases[0] != bases[1]:
        return False  # 52_8 is not 52
    sides = [_bracketed(t) for t in (first, second)]
    if all(sides) and "\\}" not in (sides[0][2], sides[1][2]):
        (a, left, z), (b, right, y) = sides
        left, right = elements(left), elements(right)
        if max(len(left), len(right)) > 1:
            if (a, z) != (b, y) or len(left) != len(right):
                return False
            return _all(decide(p, q) for p, q in zip(left, right, strict=True))
    lists = [
        elements(s[1]) if s and s[2] == "\\}" else elements(t) for s, t in zip(sides, (first, second), strict=True)
    ]
    lists = [signed(parts) for parts in lists]
    if max(map(len, lists)) > 1 and "\\begin" not in first + second:
        return _same_set(*lists)
    return None


def _all(results) -> bool | None:
    found = list(results)
    return False if False in found else None if None in found else True


def _same_set(left: list[str], right: list[str]) -> bool | None:
    """Whether two lists hold the same elements in any order."""
    if len(left) != len(right):
        return False
    open_questions, rest = False, list(right)
    for p in left:
        answers = [decide(p, q) for q in rest]
        if True in answers:
            rest.pop(answers.index(True))
        elif None in answers:
            open_questions = True
        else:
            return False
    return None if open_questions else True


class Equality:
    """Answers "are these the same?" for many pairs; remembers, and asks the symbolic check only where it must."""

    def __init__(self, seconds: float = 3.0):
        self.verifier = Verifier(seconds)
        self.known: dict[tuple[str, str], bool | None] = {}

    def __call__(self, pairs: list[tuple[str, str]]) -> list[bool | None]:
        """For every (answer, gold), whether they are the same; None for an answer that is unclear or undecided.

        A check that runs out of its time is undecided. What the budget did not reach is asked again in the next call.
        """
        for pair in self.verifier.cut:
            self.known.pop(pair, None)
        normals = [(normal(answer), normal(gold)) for answer, gold in pairs]
        clear = [not _hesitates(*pair, *n) for pair, n in zip(pairs, normals, strict=True)]
        todo = {}
        for pair in dict.fromkeys(n for n, is_clear in zip(normals, clear, strict=True) if is_clear):
            if pair not in self.known:
                decided = decide(*pair)
                if decided is None:
                    todo[pair] = None
                else:
                    self.known[pair] = decided
        self.known.update(zip(todo, self.verifier(list(todo)), strict=True))
        return [self.known[n] if is_clear else None for n, is_clear in zip(normals, clear, strict=True)]


def _hesitates(answer: str, gold: str, first: str, second: str) -> bool:
    """Whether an answer must not be compared: it is unclear, or has a comma that may be a decimal one."""
    if len(answer) > LONGEST or answer == gold:
        return False
    comma = re.fullmatch(r"(-?[0-9]+),([0-9]{1,2})", first)
    if comma and (value := rational(second)) is not None and value == Fraction(f"{comma[1]}.{comma[2]}"):
        return True
    return unclear(unwrap(answer), unwrap(gold))
