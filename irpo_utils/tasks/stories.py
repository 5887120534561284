"""The embedded task: generated arithmetic stories whose every step has a known truth, and a careless solver of them.

A problem is a story of a few events ("Ann has 12 pens. Ben gets 5 from Ann. ...") and a question about where it ends.
Each event is a step of the solution. Every kind of event has a twin with which it can be confused: *half of them* with
*2 of them*, *three times* with *3 more*. The careless solver, whose solutions the seed model M_0 is trained on, takes
an event for its twin at a rate that depends on the context: its kind, its wording, its numbers and its place in the
story (`misreading_rate`). No single rule mends that, since what is a mistake in one story is right in another.

Gold solutions are in another style than the careless solver's: they put two steps in a line where they can, and leave
out what does not matter. Both readings of an event are known for whatever value comes in, so that a solution in either
hand can be checked step by step. That check is for showing what was learned: a method sees the final answer only.

Some problems ask "odd or even?" instead of "how many?". Such an answer can be right for the wrong reason.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import product
from typing import NamedTuple

from .base import Problem, Task

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
ITEMS = ("pens", "coins", "cards", "shells", "eggs", "books", "stamps", "apples")
MARK = re.compile(r"Final answer:[ \t]*(.*)", re.IGNORECASE)
MAX_VALUE = 60  # every value on every careless path stays in 1..MAX_VALUE: the numbers are a closed vocabulary
TIMES = {2: "twice", 3: "three times"}
WORDINGS = {  # of each kind of event
    "gets": ("{who} gives {hero} {a}.", "{hero} gets {a} from {who}.", "{who} has {a} for {hero}."),
    "gives": ("{hero} gives {who} {a}.", "{who} gets {a} from {hero}.", "{hero} has {a} for {who}."),
    "times": ("A prize makes it {times} as many.", "Soon it is {times} as many.", "{hero} has {times} as many now."),
    "more": ("A prize makes it {a} more.", "Soon it is {a} more.", "{hero} has {a} more now."),
    "half": ("{hero} sells half of them.", "Half of them are lost.", "One of every 2 is lost."),
    "two": ("{hero} sells 2 of them.", "2 of them are lost.", "One is lost, and then one more."),
    "boxes": ("{hero} buys {a} boxes of {b}.", "{a} boxes come with {b} each.", "{hero} finds {a} bags, {b} in each."),
    "box": ("{hero} buys boxes of {a} and {b}.", "A box comes with {a}, one with {b}.", "{hero} finds {a}, then {b}."),
    "apart": ("{who} has {a} {items}.", "{who} keeps {a} {items}.", "{who} and {a} {items} stay away."),
    "joins": ("{who} adds {a} {items}.", "{who} brings {a} {items}.", "{who} and {a} {items} come along."),
    "fewer": ("{who} has {a} fewer than {hero}.", "{who} is {a} behind {hero}.", "{hero} has {a} more than {who}."),
    "above": ("{who} has {a} more than {hero}.", "{who} is {a} ahead of {hero}.", "{hero} has {a} fewer than {who}."),
}
PAIRS = (("gets", "gives"), ("times", "more"), ("half", "two"), ("boxes", "box"), ("apart", "joins"))
LAST = ("fewer", "above")  # these end a story, whose question is about the other person then
TWIN = {kind: twin for pair in (*PAIRS, LAST) for kind, twin in (pair, pair[::-1])}
# Tenths of the hash space that each split's problems come from. "seed" is what M_0 is pre-trained on.
BUCKETS = {"train": range(0, 4), "seed": range(4, 8), "dev": range(8, 9), "test": range(9, 10), "long": range(9, 10)}
LENGTHS = {"seed": (2, 3, 4, 5, 6), "long": (5, 6)}  # events of a story; of the splits that a method sees:
USUAL_LENGTHS = (2, 3, 4)
# The log-odds of a misreading: their mean, and the standard deviation of what each part of the context adds.
MEAN_LOGIT = -1.7
LOGIT_SPREAD = {"kind": 0.3, "wording": 1.0, "numbers": 0.8, "place": 0.8}
RATES = (0.02, 0.9)  # no context is read without error, and none always wrongly


@dataclass(frozen=True)
class Event:
    """One event of a story: its kind, which of the kind's `WORDINGS` it has, its numbers, and who else is in it."""

    kind: str
    wording: int
    a: int = 0
    b: int = 0
    who: str = ""

    def sentence(self, hero: str, items: str) -> str:
        words = {"hero": hero, "items": items, "who": self.who, "a": self.a, "b": self.b, "times": TIMES.get(self.a)}
        return WORDINGS[self.kind][self.wording].format(**words)

    def reading(self, careless: bool) -> str:
        """What the event is taken for: its kind or, carelessly, the twin."""
        return TWIN[self.kind] if careless else self.kind

    def operation(self, careless: bool = False) -> str:
        """What is done to the number that came in, as a solution writes it behind that number."""
        return operation(self.reading(careless), self.a, self.b)

    def result(self, x: int, careless: bool = False) -> int:
        """The number that there is after the event, where there were `x`."""
        return value(f"{x} {self.operation(careless)}")

    def lines(self, x: int, careless: bool = False) -> list[str]:
        """The careless solver's lines: one operation each."""
        y = self.result(x, careless)
        if "box" not in self.kind:
            return [f"{x} {self.operation(careless)} = {y}"]
        bought = self.operation(careless).removeprefix("+ ")
        return [f"{bought} = {value(bought)}", f"{x} + {value(bought)} = {y}"]


@cache
def operation(kind: str, a: int, b: int) -> str:
    """What an event of this kind and numbers does to the number that came in, as in "+ 3"."""
    return {
        "gets": f"+ {a}",
        "gives": f"- {a}",
        "times": f"* {a}",
        "more": f"+ {a}",
        "half": "/ 2",
        "two": "- 2",
        "boxes": f"+ {a} * {b}",
        "box": f"+ {a} + {b}",
        "apart": "+ 0",
        "joins": f"+ {a}",
        "fewer": f"- {a}",
        "above": f"+ {a}",
    }[kind]


@lru_cache(1 << 16)  # drawing stories asks for the same few thousand again and again
def value(expression: str) -> int:
    """What an expression of whole numbers and + - * / comes to, * and / first, each from left to right."""
    total, sign, term, operator = 0, 1, 0, ""
    for word in expression.split():
        if word in ("+", "-"):
            total, sign, operator = total + sign * term, 1 if word == "+" else -1, ""
        elif word in ("*", "/"):
            operator = word
        elif operator:
            term = term * int(word) if operator == "*" else term // int(word)
        else:
            term = int(word)
    return total + sign * term


@dataclass(frozen=True)
class Story:
    """A start value, the events that follow, and whether the question is "how many?" or "odd or even?"."""

    hero: str
    items: str
    start: int
    events: tuple[Event, ...]
    guessable: bool

    def question(self) -> str:
        who = self.events[-1].who if self.events[-1].kind in LAST else self.hero
        ending = (
            f"Is the number that {who} has odd or even?"
            if self.guessable
            else f"How many {self.items} does {who} have?"
        )
        sentences = [event.sentence(self.hero, self.items) for event in self.events]
        return " ".join([f"{self.hero} has {self.start} {self.items}.", *sentences, ending])

    def answer(self, x: int) -> str:
        return ("even", "odd")[x % 2] if self.guessable else str(x)

    def solution(self, careless: tuple[bool, ...]) -> tuple[str, str]:
        """The careless solver's solution that misreads the events marked in `careless` [events]; its final answer."""
        x, lines = self.start, []
        for event, misread in zip(self.events, careless, strict=True):
            lines += event.lines(x, misread)
            x = event.result(x, misread)
        return "\n".join([*lines, f"Final answer: {self.answer(x)}"]), self.answer(x)

    def gold(self) -> str:
        """The solution in the other style: two steps in a line where they can be, and no step that changes nothing."""
        x, at, lines = self.start, 0, []
        while right := [m for m in joined_lines(self.events[at:], x) if not any(m.careless)]:
            longest = max(right, key=lambda move: len(move.text))
            lines.append(longest.text)
            x, at = longest.x, at + len(longest.careless)
        return "\n".join([*lines, f"Final answer: {self.answer(x)}"])

    def key(self) -> str:
        """What makes two stories the same problem: the numbers and events, whoever they are about."""
        return repr((self.start, [(e.kind, e.wording, e.a, e.b) for e in self.events]))


class Move(NamedTuple):
    """A line that a solution may go on with, and what it makes of the events that come next."""

    text: str
    careless: tuple[bool, ...]  # for each event that it takes
    x: int  # the number that there is then
    bought: int | None = None  # what the next line adds, where the event has two lines


def joined_lines(events: tuple[Event, ...], x: int) -> Iterator[Move]:
    """The lines by gold's hand that may come next: one or two operations, in every reading of the events."""
    for size in range(1, len(events) + 1):
        for careless in product((False, True), repeat=size):
            taken = list(zip(events, careless, strict=False))
            counted = [event.operation(c) for event, c in taken if event.reading(c) != "apart"]
            ends = taken[-1][0].reading(careless[-1]) != "apart"
            brackets = len(counted) == 2 and counted[1][0] in "*/" and counted[0][0] in "+-"
            if ends and len(counted) in (1, 2) and not brackets:
                expression = " ".join([str(x), *counted])
                yield Move(f"{expression} = {value(expression)}", careless, value(expression))
        if size > 2 and not any("apart" in (e.kind, TWIN[e.kind]) for e in events[:size]):
            return  # no longer line has two operations


def single_lines(events: tuple[Event, ...], x: int) -> Iterator[Move]:
    """The lines by the careless solver's hand that may come next, in either reading of the event."""
    for careless in (False, True) if events else ():
        first, *second = events[0].lines(x, careless)
        bought = last_number(first) if second else None
        yield Move(first, (careless,), x if second else events[0].result(x, careless), bought)


def last_number(line: str) -> int | None:
    found = re.search(r"= (\d{1,9})$", line)
    return int(found[1]) if found else None


class Check(NamedTuple):
    """What is right in a solution, or in the rest of one."""

    lines: tuple[bool, ...]  # of each line that is not empty: whether it is right given those before it
    events: tuple[str, ...]  # of each event: "right", "careless" (its twin), "other" (anything else), "missing"
    extra: bool = False  # lines that no event is left for

    def errors(self) -> int:
        return self.lines.count(False) + len(self.events) - self.events.count("right") + 4 * self.extra


def check(story: Story, response: str) -> Check:
    """Hold a solution, in either hand, against the story, line by line, each on the number that came into it.

    Where a line can be read in two ways (Ben's 5 counted in, or left out and somebody's 5 added), that reading is taken
    which leaves the fewest errors in the whole.
    """
    lines = [line for line in response.split("\n") if line.strip()]

    def rest(line: int, at: int, x: int | None, bought: int | None = None) -> Check:
        """From this line and event on, where there are `x`, and `bought` come to them in the event's second line."""
        left, todo = story.events[at:], lines[line:]
        if not todo:
            return Check((), ("missing",) * len(left))
        if todo[0].startswith("Final answer:"):  # an event that changes nothing needs no line
            verdicts = tuple({"apart": "right", "joins": "careless"}.get(e.kind, "missing") for e in left)
            right = set(verdicts) <= {"right"} and x is not None and todo[0] == f"Final answer: {story.answer(x)}"
            return Check((right, *[False] * (len(todo) - 1)), verdicts, len(todo) > 1)
        if x is None:
            return Check((False,) * len(todo), ("missing",) * len(left))
        if not left:
            return after((False,), (), rest(line + 1, at, x))._replace(extra=True)
        return min(goings_on(line, at, x, bought), key=Check.errors)

    def goings_on(line: int, at: int, x: int, bought: int | None) -> Iterator[Check]:
        text, left = lines[line], story.events[at:]
        result, found = last_number(text), False
        if bought is not None:
            right = text == f"{x} + {bought} = {x + bought}"
            yield after((right,), ("right" if right else "other",), rest(line + 1, at + 1, result))
            return
        for move in (*single_lines(left, x), *joined_lines(left, x)):
            if move.text == text:
                found, verdicts = True, tuple("careless" if c else "right" for c in move.careless)
                if move.bought is None:
                    yield after((not any(move.careless),), verdicts, rest(line + 1, at + len(verdicts), move.x))
                else:  # the event's verdict is that of both lines
                    below = rest(line + 1, at, x, move.bought)
                    own = verdicts[0] if below.events[0] == "right" else below.events[0]
                    yield after((not move.careless[0],), (own,), below._replace(events=below.events[1:]))
        if not found:
            second = "box" in left[0].kind and not text.startswith(f"{x} ") and result is not None
            below = rest(line + 1, at, x, result) if second else rest(line + 1, at + 1, result)
            yield after((False,), ("other",), below._replace(events=below.events[second:]))

    return rest(0, 0, story.start)


def after(lines: tuple[bool, ...], events: tuple[str, ...], rest: Check) -> Check:
    return rest._replace(lines=lines + rest.lines, events=events + rest.events)


@cache
def _normal(*context: str | int) -> float:
    """A standard normal number that depends on the context alone."""
    return random.Random("/".join(map(str, context))).gauss(0, 1)


def misreading_rate(event: Event, place: int) -> float:
    """How often the careless solver takes this event, the `place`-th of its story from 0, for its twin."""
    wording = (event.kind, event.wording)
    parts = {
        "kind": _normal(event.kind),
        "wording": _normal(*wording),
        "numbers": _normal(*wording, "numbers", int(event.a > 4), int(event.b > 3)),
        "place": _normal(*wording, "place", min(place, 2)),
    }
    logit = MEAN_LOGIT + sum(LOGIT_SPREAD[name] * part for name, part in parts.items())
    return min(max(1 / (1 + math.exp(-logit)), RATES[0]), RATES[1])


def careless_choice(story: Story, rng: random.Random) -> tuple[bool, ...]:
    """Which events the careless solver misreads this time."""
    return tuple(rng.random() < misreading_rate(event, place) for place, event in enumerate(story.events))


def outcomes(event: Event, values: set[int]) -> set[int] | None:
    """The values that may come out when any of `values` comes in, over both readings; None if one leaves the range.

    With this, no careless path ever meets a number outside 1..MAX_VALUE or half of an odd one.
    """
    if "half" in (event.kind, TWIN[event.kind]) and any(x % 2 for x in values):
        return None
    readings = [event.operation(careless) for careless in (False, True)]
    found = {value(f"{x} {reading}") for x in values for reading in readings}
    return found if min(found) >= 1 and max(found) <= MAX_VALUE else None


def draw_event(rng: random.Random, kind: str, who: str) -> Event:
    wording = rng.randrange(len(WORDINGS[kind]))
    if kind in ("half", "two"):
        return Event(kind, wording, 2)
    if kind in ("times", "more"):
        return Event(kind, wording, rng.choice(list(TIMES)))
    if kind in ("boxes", "box"):
        return Event(kind, wording, rng.randint(2, 4), rng.randint(2, 6))
    return Event(kind, wording, rng.randint(2, 9), who=who)


def draw_story(rng: random.Random, lengths: tuple[int, ...], guessable_share: float) -> Story:
    """One random story of a number of events among `lengths`."""
    while True:
        hero, *others = rng.sample(NAMES, len(NAMES))
        length = rng.choice(lengths)
        pairs = rng.sample(PAIRS, min(length, len(PAIRS))) + rng.choices(PAIRS, k=max(0, length - len(PAIRS)))
        kinds = [rng.choice(pair) for pair in pairs]
        if rng.random() < 0.35:
            kinds[-1] = rng.choice(LAST)
        start, events = rng.randint(4, 30), []
        values = {start}
        for kind, other in zip(kinds, others, strict=False):
            drawn = (draw_event(rng, kind, other) for _ in range(12))
            fitting = next(((e, out) for e in drawn if (out := outcomes(e, values))), None)
            if fitting is None:
                break
            events.append(fitting[0])
            values = fitting[1]
        else:
            return Story(hero, rng.choice(ITEMS), start, tuple(events), rng.random() < guessable_share)


@lru_cache(16)  # a stage asks for a split several times
def draw_problems(split: str, count: int, seed: int, guessable_share: float) -> tuple[tuple[str, Story], ...]:
    """`count` different stories of a split. The splits are disjoint because each owns a part of the hash space.

    Those of "long" have more events than those of train, dev and test.
    """
    rng, found = random.Random(f"{seed}/{split}"), {}
    while len(found) < count:
        story = draw_story(rng, LENGTHS.get(split, USUAL_LENGTHS), guessable_share)
        digest = hashlib.sha256(story.key().encode()).hexdigest()
        if int(digest, 16) % 10 in BUCKETS[split]:
            found.setdefault(digest[:12], story)
    return tuple(found.items())


class Stories(Task):
    """The `stories` task."""

    def problems(self, split: str) -> list[Problem]:
        size = getattr(self.config, f"{split}_size", self.config.test_size)
        drawn = draw_problems(split, size, self.config.seed, self.config.guessable_share)
        return [make_problem(name, story) for name, story in drawn]

    def prompt(self, problem: Problem) -> str:
        return prompt(problem.question)

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        return marked_answer(response)

    def equal(self, answer: str, problem: Problem) -> bool | None:
        if not re.fullmatch(r"[0-9]{1,9}|odd|even", answer):  # nothing that the seed model was taught to answer
            return None
        return answer == problem.answer

    def check_steps(self, problem: Problem, response: str) -> list[tuple[str, str]]:
        """(kind, verdict) of every event in story order; lines that are too many count as one more event, "extra"."""
        story = story_of(problem)
        found = check(story, response)
        verdicts = [(event.kind, verdict) for event, verdict in zip(story.events, found.events, strict=True)]
        return verdicts + [("extra", "other")] * found.extra

    def check_lines(self, problem: Problem, response: str) -> list[bool]:
        """Whether each non-empty line is right *given the lines before it*, [lines]; the final answer is one."""
        return list(check(story_of(problem), response).lines)


def marked_answer(response: str) -> str | None:
    """The text after the last "Final answer:" of a response, to the end of its line; None where there is none.

    The last mark counts, since a chain of thought may mention one before it concludes.
    """
    found = MARK.findall(response)
    answer = found[-1].strip().rstrip(".") if found else ""
    return answer or None


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:\n"


def make_problem(name: str, story: Story) -> Problem:
    _, answer = story.solution((False,) * len(story.events))
    return Problem(name, story.question(), answer, story.gold(), {"story": asdict(story)})


def story_of(problem: Problem) -> Story:
    raw = problem.meta["story"]
    return Story(**{**raw, "events": tuple(Event(**event) for event in raw["events"])})
