"""Where the final answer of a response stands: the marks that announce it, and the text behind them."""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST = 1000  # characters of an answer; what is longer is cut, and equals nothing
# The marks of a final answer, the surest first. What follows one is the answer, on its line or on the next that says
# something; `[\s*_]` steps over Markdown's emphasis.
MARKS = {
    "final answer": re.compile(r"final\s{1,3}answer(?:[\s*_]{0,6}[:：]|[ \t*_]{0,4}\n)", re.IGNORECASE),
    "boxed": re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])"),
    "####": re.compile(r"####(?=[ \t]{0,8}[^\s#])"),
    "the answer is": re.compile(r"\b(?:answer|option|choice)\s{1,3}is\b[\s*_]{0,4}[:：]?", re.IGNORECASE),
    "Answer:": re.compile(r"^[ \t*_#]{0,8}Answer[ \t*_]{0,4}:", re.MULTILINE),
    "A:": re.compile(r"^[ \t*_#]{0,8}A[ \t*_]{0,4}:", re.MULTILINE),
}
_FRAME = re.compile(r"[\s*_]*(?:\\\[|\$\$|`{3}[a-z]*|[*_\s])*")  # a line that only opens a formula or a block
_PREFIX = re.compile(
    r"(?:so[, ]\s?|thus[, ]\s?)?(?:the|my|our)?\s{0,2}(?:final |correct )?(?:answer|result) is[: ]\s{0,3}",
    re.IGNORECASE,
)
_RETRACTED = re.compile(
    r"\b(?:actually|wait|correction|recheck|maybe|perhaps|alternatively|(?<=[.!?] )or)\b", re.IGNORECASE
)

# What denies, doubts or changes a box from right beside it. A bound is none of it: "so there are at least \\boxed{5}".
_BESIDE = (
    re.compile(
        r"(?:\b(?:not|never|negative|minus|maybe|perhaps|possibly|half of|twice|[a-z]+n['’]t)"
        r"|≠|√|\\(?:neq?|not|neg)|=\s?[-−])"
        r"\s?\$*\s?$"
        r"|(?<![:\w−-])[-−]\$*$|(?<![\w.,])[0-9]{1,9}$",
        re.IGNORECASE,
    ),
    re.compile(
        r"[.,][0-9]{1,9}|(?-i:[kKM])(?![a-zA-Z])|-[0-9][0-9.,]{0,9}|\s?[+*/]\s?[0-9][0-9.,]{0,9}"
        r"|\s?\\(?:pi|[dt]?frac|sqrt|times|cdot)(?![a-zA-Z])[^$]{0,30}"
        r"|\s?\$*\s?(?:\^.{0,9}|!(?=[\^!])|\b(?:hundred|thousand|million|billion|dozen|squared|cubed)\b"
        r"|,?\s?\b(?:or|maybe|perhaps)\b.{0,30}|\b(?:isn['’]t|is (?:not|wrong|incorrect))\b.{0,20})",
        re.IGNORECASE,
    ),
)
# The kinds of words, a letter each, that decide whether an answer is understood. What a number counts needs no list:
# a word that is in none is a noun or filler (w).
_KINDS = {
    # h: it leaves open which answer is meant, or says that something is none
    "h": """maybe perhaps possibly probably presumably likely unlikely guess unsure uncertain might may
        otherwise alternatively unless actually correction recheck sorry no not never neither nor none
        nobody nothing cannot isnt arent wasnt werent doesnt dont didnt cant wont false wrong incorrect except excluding
        instead rather but something somewhere""",
    # c: it makes another number of the one beside it
    "c": """half halves halved third thirds quarter fourth fourths fifths sixths sevenths eighths ninths tenth tenths
        twelfths hundredth hundredths thousandths twice thrice double doubled triple tripled quadruple quadrupled
        squared cubed sqrt root roots log ln sin cos tan exp factorial reciprocal inverse mod modulo power negative
        divided multiplied gross hundred hundreds thousand thousands million millions billion billions trillion
        trillions lakh lakhs crore crores bn mn below ish fold short shy""",
    "D": "dozen dozens",
    "r": "or either",
    "j": "and vs versus",
    "k": "to",
    "i": "if",
    "p": "in at per for of after by every each with on from during within among until out",
    "d": "over under above nearly almost exceeds exceeding beyond past",
    "l": "less fewer more greater higher lower",
    "t": "than",
    "T": "times",
    "o": "plus",
    "-": "minus",
    "s": "st nd rd th",  # right behind a number
    "%": "percent",
    "q": """two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
        eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety zero""",
}
_KIND = {word: kind for kind, words in _KINDS.items() for word in words.split()}


def kind_of(word: str) -> str:
    """The kind of a word, as `_KINDS` has them; "w" for a noun or filler."""
    word = word.lower()
    return "h" if word.endswith(("n't", "n’t")) else _KIND.get(word, "w")


def braced(text: str, at: int) -> str | None:
    """What stands between the brace at `text[at]` and the one that closes it; None where none does within `LONGEST`."""
    depth, i, end = 0, at, min(len(text), at + LONGEST + 2)
    while i < end:
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[at + 1 : i]
        i += 1
    return None


def boxed(text: str) -> str | None:
    r"""The content of the last whole `\boxed{...}` (or `\fbox{...}`, or `\boxed 5`).

    Of several in a row ("\boxed{5} and \boxed{6}") all, with commas between them.
    """
    found = _last_boxes(text)
    return found[2] if found else None


def boxed_as_said(text: str) -> str | None:
    r"""What is boxed, with the words and signs right beside it that change it: "not \boxed{5}", "\boxed{5} hundred"."""
    found = _last_boxes(text)
    if found is None:
        return None
    start, end, inside = found
    before, after = _BESIDE[0].search(text[max(0, start - 40) : start]), _BESIDE[1].match(text[end : end + 40])
    if not before and not after:
        return inside
    said = re.sub(r"^=\s?|\$", "", before[0]) if before else ""
    joint = "*" if said.isdigit() else ""  # "2\\boxed{5}" is not 25
    return f"{said}{joint}{inside}{after[0].replace('$', '') if after else ''}".strip()


def _last_boxes(text: str) -> tuple[int, int, str] | None:
    """(start, end, what is inside) of the last box, or of the last boxes in a row."""
    spans: list[tuple[int, int, str]] = []
    for match in list(MARKS["boxed"].finditer(text))[-20:]:
        at = match.end()
        while text[at : at + 1] == " ":
            at += 1
        if text[at : at + 1] != "{":
            bare = re.match(r"[^\s$.,{}]{1,50}", text[at : at + 50])
            if bare:
                spans.append((match.start(), at + bare.end(), bare[0]))
        elif (inside := braced(text, at)) is not None:
            spans.append((match.start(), at + len(inside) + 2, inside))
    found: list[str] = []
    for i, (_, end, inside) in reversed(list(enumerate(spans))):
        if found and not re.fullmatch(r"[\s$,;]{0,6}(?:and|or)?[\s$,;]{0,6}", text[end : spans[i + 1][0]]):
            break
        found.append(inside)
    if not found:
        return None
    return spans[-len(found)][0], spans[-1][1], ", ".join(reversed(found))


def candidates(response: str, gold: str | None = None) -> Iterator[str]:
    """The marked final answers of a response: the last of every kind of mark, the surest kind first.

    Where a sentence begins with the words of `gold`, it is these: only who knows them knows that "St." ends none.
    """
    for kind, pattern in MARKS.items():
        if kind == "boxed":
            found = boxed_as_said(response)
        else:
            ends = [match.end() for match in pattern.finditer(response)][-20:]
            found = next((text for end in reversed(ends) if (text := _after(response, end, gold))), None)
        if found and found.strip():
            yield found.strip()


def _after(response: str, at: int, gold: str | None = None) -> str | None:
    """The answer behind a mark: the rest of its line, or the first of the next lines that says something."""
    stated = gold and re.compile(rf"[\s*_`\"'“‘]*{re.escape(gold)}[*_`\"'”’]*(?:\s*$|[.!][*_`\"'”’]*(?:\s|$))", re.I)
    while at and response[at - 1] in "*_":  # "__init__" begins with what a mark took for emphasis
        at -= 1
    for i, line in enumerate(response[at : at + LONGEST].split("\n")[:6]):
        if stated and (found := stated.match(line)) and not _RETRACTED.search(line, found.end()):
            return gold
        text = line.strip(" \t*_\r")
        text = re.sub(r"^[-•] (?=\S)", "", text) if i else text  # a bullet
        if text.strip(".$") and not _FRAME.fullmatch(text):
            return boxed_as_said(text) or _concluded(text) or None
    return None


def _concluded(text: str) -> str:
    """ "The final answer is $18$. I hope it is correct." -> "$18$" """
    text = text.strip().strip("*_` \t")
    prefix = _PREFIX.match(text)
    text = text[prefix.end() :] if prefix else text
    if _RETRACTED.search(text):
        return text
    return re.split(r"(?<=[^\s.])\.(?=\s+[A-Z])", text, maxsplit=1)[0].rstrip(". \t*_`")
