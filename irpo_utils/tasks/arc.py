"""ARC (Clark et al., arXiv 1803.05457): science questions with three to five options. Zero-shot.

Trained on ARC-Easy and ARC-Challenge together, and tested on ARC-Challenge, as in arXiv 2404.19733. There are no gold
solutions.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Set
from typing import ClassVar

from ..answers.marks import LONGEST, candidates, kind_of
from .base import Problem
from .records import RecordTask

LETTERS = "ABCDE"
UNCLEAR = "?"  # of an answer that is not understood
PROMPT = (
    "Answer the question below by choosing one of the options. Reason step by step first. When you are done, finish "
    'with a line of the form "Final answer: (X)", with the letter of your option in place of X.\n\n'
    "Question: {question}"
)
_LETTER = re.compile(
    r"(?:(?:option|choice|answer)\s{1,2})?(?:[(\[{]\s?([A-Ea-e1-5])\s?[)\]}]|([A-Ea-e1-5])(?![\w'’]))", re.I
)
_LEAD = re.compile(
    r"^(?:it is|it's|i (?:choose|pick|select)|answer:|the (?:correct |best )?(?:option|choice|answer) is)\s{1,3}", re.I
)
_SEVERAL = re.compile(r"(?:both|either)\b.*\b(?:and|or)\b", re.I)
_DENIED = re.compile(r"[)\s]{0,3}(?:isn't|(?:is|was|cannot be)\s(?:not|wrong|incorrect|false))\b", re.I)
_OTHER = re.compile(
    r"(?<!not )(?:\b(?:or|and)\s{1,3}(?:maybe |perhaps |possibly )?\(?|[,/&+]\s{0,3}\(?|^\s{0,3}\(|^\s{1,3})"
    r"([A-E])(?=\)|\s*(?:$|[.,;/&]|or\b|and\b))"
)
# Behind a letter: what begins a reason, or rules another option out. What stands there may name any option.
_BECAUSE = re.compile(
    r"\b(?:because|since|as|due to|which|that|so|where|while|whereas|for)\b"
    r"|(?:\bnot|\brather than|\binstead of|\bnor) \(?[A-E]\b",
    re.I,
)
_REASON = re.compile(_BECAUSE.pattern + "|[.;:] ", re.I)
_NAMED = re.compile(r"(?<![\w'’])\(?([B-E])(?![\w'’])|\(A\)|\bA[).]*$")
_ALONE = re.compile(r"[\s).,;:/|&~>+-]*(?:then |however )?\(?([A-E])[\s.)]*$")
_WORDS = re.compile(r"[a-z]+(?:['’]t)?")
_DENIALS = frozenset(["not", "no", "never", "none", "nothing", "nobody", "neither", "nor", "cannot", "without"])
_BRACKETED = re.compile(r"\(([A-E])\)")
_NOISE = re.compile(r"\\text(?:bf|rm|it)?\b|\\math(?:rm|bf)\b|[$*`{}\\]|\\[()\[\]]")
# The options once more: no mark of an answer.
_LISTED = re.compile(r"^[ \t*_#]{0,8}A[ \t*_]{0,4}:(?=.*\n{1,3}[ \t*_#]{0,8}B[ \t*_]{0,4}:)", re.MULTILINE)
_AFTER_A = re.compile(r"\s*(?:$|[=.,;:)\]\-–—(]|because\b|since\b|is\b|as\b)", re.I)


def plain_text(text: str) -> str:
    """An option's text as it is compared: lower case, without punctuation at the ends, articles and doubled spaces."""
    return re.sub(r"\s+", " ", re.sub(r"^(?:an?|the)\s+", "", text.lower().strip(" \t\n.,;:!?\"'"))).strip()


def _hedged(text: str, own: Set[str] = frozenset()) -> bool:
    """Whether words leave open what is meant, or begin by denying it.

    A "not" further on may be what an option says, and so may the words of its `own` text.
    """
    words = [word for word in _WORDS.findall(text.lower()) if word not in own]
    denials = [word in _DENIALS or word.endswith(("n't", "n’t")) for word in words]
    unsure = any(kind_of(word) in ("h", "i") and not denied for word, denied in zip(words, denials, strict=True))
    return "?" in text or unsure or any(denials[:2])


def _names(line: str, option: str) -> bool:
    """Whether a line holds an option's text as whole words."""
    wanted = plain_text(option)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", line.lower()) is not None


class ARC(RecordTask):
    """The `arc_challenge` task.

    The upstream record is {"id", "question", "choices": {"text", "label"}, "answerKey"}.
    """

    sources: ClassVar[dict[str, list[str]]] = {
        "train": ["allenai/ai2_arc:ARC-Easy:train", "allenai/ai2_arc:ARC-Challenge:train"],
        "test": ["allenai/ai2_arc:ARC-Challenge:test"],
    }
    template = PROMPT
    fields = ("question", "choices", "answerKey")

    def problem(self, name: str, record: dict) -> Problem:
        options = self.options(record["choices"])
        answer = self.gold(record["answerKey"], options, record["choices"]["label"])
        listed = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))
        return Problem(name, f"{record['question']}\n\n{listed}", answer, "", {"options": options})

    def options(self, choices: dict) -> list[str]:
        texts, labels = (choices.get(key) if isinstance(choices, dict) else None for key in ("text", "label"))
        if not isinstance(texts, list) or not isinstance(labels, list) or not 2 <= len(texts) == len(labels) <= 5:
            raise ValueError('choices: expected {"text": [...], "label": [...]} with two to five options')
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError("choices: every option must be text that is not empty")
        if len({str(label) for label in labels}) < len(labels):
            raise ValueError(f"choices: two options have the same label, in {labels}")
        return texts

    def gold(self, key: str, options: list[str] | None = None, labels: list[str] | None = None) -> str:
        """The gold letter. Labels 1 to 5, which some upstream records have, become A to E, in the options' order."""
        labels = [str(label) for label in labels or []]
        if key in labels:
            return LETTERS[labels.index(key)]
        key = key.strip().strip("()").upper()
        letter = LETTERS[int(key) - 1] if key in tuple("12345") else key
        if letter not in tuple(LETTERS[: len(options)] if options else LETTERS):
            raise ValueError(f"the gold answer {key[:40]!r} is not the label of an option")
        return letter

    def posed(self, name: str, gold: str, record: dict) -> Problem:
        if record.get("choices") is None:
            return Problem(name, "", self.gold(gold))
        options = self.options(record["choices"])
        return Problem(name, "", self.gold(gold, options, record["choices"]["label"]), "", {"options": options})

    def _by_text(self, text: str, options: list[str]) -> str | None:
        wanted = plain_text(text)
        texts = [plain_text(_NOISE.sub("", option)) for option in options]
        found = [letter for letter, option in zip(LETTERS, texts, strict=False) if option == wanted]
        return found[0] if len(found) == 1 else None

    def choice(self, text: str, options: list[str]) -> str | None:
        """The letter of the option that a marked answer names, by its text or by its label; None for none or several.

        "?" stands for an answer that is not understood: it names an option, and words beside it that may change that.
        """
        text = _NOISE.sub("", unicodedata.normalize("NFKC", text[:LONGEST])).strip().strip("\"'“”")
        if (letter := self._by_text(text, options)) is not None:
            return letter
        text = _LEAD.sub("", text)
        behind = re.fullmatch(r"(.+?)\s?\(([A-E])\)[.!]?", text)  # "a cat (B)"
        if behind and (by_text := self._by_text(behind[1], options)) is not None:
            return by_text if by_text == behind[2] else UNCLEAR
        match = _LETTER.match(text)
        if not match:
            return UNCLEAR if _NAMED.search(text) and not _SEVERAL.match(text) else None
        label, rest = match[1] or match[2], text[match.end() :]
        bare = match[1] is None
        letter = LETTERS[int(label) - 1] if label.isdigit() else label.upper()
        claim = _BECAUSE.split(self._without_text(rest, letter, options), maxsplit=1)[0]
        alone = _ALONE.fullmatch(claim)
        others = set(_OTHER.findall(claim[:40]) + ([alone[1]] if alone else [])) - {label.upper()}
        if others and not label.isdigit():
            return None  # "(A) or (B)" and "A/B" choose nothing
        if label.isdigit() and any(re.match(r"\W*[0-9]", option) for option in options):
            return UNCLEAR  # the second option, or the one that says 2
        if bare and (
            (label.islower() and rest.strip(" .)")) or (label in "Aa" and not self._may_follow(label, rest, options))
        ):
            return UNCLEAR if _hedged(rest) or _NAMED.search(rest) else None  # the article: "A storm"
        if bare and label.isdigit() and rest.strip(" .)") and not rest.startswith((")", ".", ":")):
            return None  # a quantity: "3 meters"
        if _DENIED.match(rest):
            return None
        return letter if self._understood(rest, letter, options) else UNCLEAR

    def _without_text(self, rest: str, letter: str, options: list[str]) -> str:
        """What stands behind a letter, without the text of its option if it begins with that."""
        own = dict(zip(LETTERS, options, strict=False)).get(letter, "")
        own = re.escape(plain_text(_NOISE.sub("", own))).replace(r"\ ", r"\s+")
        return re.sub(r"^[\s().:\]},–-]*(?:(?:an?|the)\s+)?" + own + r"(?!\w)", "", rest, flags=re.I) if own else rest

    def _understood(self, rest: str, letter: str, options: list[str]) -> bool:
        """Whether what stands behind a letter leaves it as it is: an option's text, a reason, or other plain words."""
        behind = re.sub(r"^[\s().:\]},–-]+", "", rest).rstrip(") ")
        texts = [plain_text(_NOISE.sub("", option)) for option in options]
        for option in sorted(texts, key=len, reverse=True):
            if option and plain_text(behind).startswith(option):
                behind = plain_text(behind)[len(option) :]
                break
        claim = _REASON.split(behind, maxsplit=1)[0]
        named = {m[1] or "A" for m in _NAMED.finditer(claim)} - {letter}
        own = dict(zip(LETTERS, texts, strict=False)).get(letter, "")
        return not named and not _hedged(claim, set(_WORDS.findall(own)))

    def _may_follow(self, label: str, rest: str, options: list[str]) -> bool:
        return bool(_AFTER_A.match(rest)) or (bool(options) and plain_text(rest) == plain_text(options[0]))

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        options = problem.meta.get("options") or []
        found = list(candidates(_LISTED.sub("", response)))
        for text in found:
            if (letter := self.choice(text, options)) is not None:
                return text[:LONGEST] if letter == UNCLEAR else letter
        first = found[0] if found else None
        lines = response.rstrip()[-LONGEST:].splitlines()
        last = lines[-1].strip() if lines else ""
        if first is None and last and len(last) < 300:
            bare = re.fullmatch(r"[(\[*]{0,3}([A-E1-5])[)\].*:]{0,4}", last)
            labelled = re.fullmatch(r"[(\[*]{0,3}([A-E1-5])[)\].:*]{1,4}\s+(.{1,300})", last)
            if bare or (labelled and self._by_text(labelled[2], options) is not None):
                letter = self.choice((bare or labelled)[1], options)
                return last if letter == UNCLEAR else letter
        if first is None and flexible:
            named = _BRACKETED.findall(response[-4000:])
            by_text = {a for line in lines[-1:] for a, o in zip(LETTERS, options, strict=False) if _names(line, o)}
            return named[-1] if named else by_text.pop() if len(by_text) == 1 else None
        return first[:LONGEST] if first else None

    def equal(self, answer: str, problem: Problem) -> bool | None:
        if answer not in tuple(LETTERS) and self.choice(answer, problem.meta.get("options") or []) == UNCLEAR:
            return None
        return answer == problem.answer

    def chance(self, problem: Problem) -> float:
        return 1 / len(problem.meta["options"])
