"""The embedded task: generated arithmetic word problems whose every step has a known truth.

A problem is a story of a few events ("Ann has 12 pens. Ann sells half of them. ...") and a question about where it
ends. Each event is one step of the solution. A *careless* solver, whose solutions the seed model M_0 is trained on,
misreads five kinds of event, each at its own rate (`MISCONCEPTIONS`). Both readings of an event are known for whatever
value comes in, so any sampled solution can be checked step by step. That check is for showing what was learned:
the method sees the final answer only.

A share of the problems ask "odd or even?" instead of "how many?". Such an answer can be right for the wrong reason.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import asdict, dataclass
from itertools import product

from .base import Problem, Task

MAX_VALUE = 39  # every value on every careless path stays in 1..MAX_VALUE: the numbers are a closed vocabulary
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
ITEMS = ("pens", "coins", "cards", "shells", "eggs", "books", "stamps", "apples")
TIMES = {2: "twice", 3: "three times", 4: "four times"}
# How often the careless solver misreads each kind of event. Above one half, greedy decoding of M_0 is wrong.
MISCONCEPTIONS = {
    "half": 0.95,  # "sells half" read as "sells 2"
    "times": 0.88,  # "three times as many" read as "3 more"
    "bystander": 0.78,  # somebody else's things added in
    "bags": 0.6,  # "3 bags of 4" read as 3 + 4
    "fewer": 0.4,  # "5 fewer than" read as "5 more than"
}
MARK = re.compile(r"Final answer:[ \t]*(.*)", re.IGNORECASE)
PLAIN = ("finds", "loses")
# Tenths of the hash space that each split's problems come from. "seed" is what M_0 is pre-trained on.
BUCKETS = {"train": range(0, 4), "seed": range(4, 8), "dev": range(8, 9), "test": range(9, 10)}


@dataclass(frozen=True)
class Event:
    """One event of a story: its kind, its numbers, and who else is in it ("bystander" and "fewer")."""

    kind: str
    a: int
    b: int = 0
    who: str = ""

    def sentence(self, hero: str, items: str) -> str:
        return {
            "start": f"{hero} has {self.a} {items}.",
            "finds": f"{hero} finds {self.a} more.",
            "loses": f"{hero} loses {self.a} of them.",
            "half": f"{hero} sells half of them.",
            "times": f"A prize makes it {TIMES.get(self.a)} as many.",
            "bystander": f"{self.who} has {self.a} {items}.",
            "bags": f"{hero} buys {self.a} bags of {self.b} each.",
            "fewer": f"{self.who} has {self.a} fewer than {hero}.",
        }[self.kind]

    def step(self, x: int, careless: bool) -> list[tuple[str, int, str, int, int]]:
        """What a solver computes when `x` comes in, a line each: (head, left, operator, right, result)."""
        a, b = self.a, self.b
        if self.kind == "bags":
            held = a + b if careless else a * b
            return [("Bags:", a, "+" if careless else "*", b, held), ("Buy:", x, "+", held, x + held)]
        if self.kind == "half":
            return [("Half:", x, "-", 2, x - 2) if careless else ("Half:", x, "/", 2, x // 2)]
        if self.kind == "times":
            return [("Times:", x, "+", a, x + a) if careless else ("Times:", x, "*", a, x * a)]
        if self.kind == "bystander":
            return [(f"{self.who}:", x, "+", a, x + a) if careless else (f"{self.who}:", x, "+", 0, x)]
        if self.kind == "fewer":
            return [(f"{self.who}:", x, "+", a, x + a) if careless else (f"{self.who}:", x, "-", a, x - a)]
        return [("Find:", x, "+", a, x + a) if self.kind == "finds" else ("Lose:", x, "-", a, x - a)]

    def text(self, x: int, careless: bool) -> str:
        return "\n".join(f"{head} {left} {op} {right} = {y}" for head, left, op, right, y in self.step(x, careless))


@dataclass(frozen=True)
class Story:
    """A start value, the events that follow, and whether the question is "how many?" or "odd or even?"."""

    hero: str
    items: str
    start: int
    events: tuple[Event, ...]
    guessable: bool

    def question(self) -> str:
        who = self.events[-1].who if self.events[-1].kind == "fewer" else self.hero
        sentences = [event.sentence(self.hero, self.items) for event in (Event("start", self.start), *self.events)]
        ending = (
            f"Is the number that {who} has odd or even?"
            if self.guessable
            else f"How many {self.items} does {who} have?"
        )
        return " ".join([*sentences, ending])

    def answer(self, value: int) -> str:
        return ("even", "odd")[value % 2] if self.guessable else str(value)

    def solution(self, careless: tuple[bool, ...]) -> tuple[str, str]:
        """The solution that misreads the events marked in `careless` [events], and its final answer."""
        x, lines = self.start, []
        for event, misread in zip(self.events, careless, strict=True):
            lines.append(event.text(x, misread))
            x = event.step(x, misread)[-1][-1]
        return "\n".join([*lines, f"Final answer: {self.answer(x)}"]), self.answer(x)

    def key(self) -> str:
        """What makes two stories the same problem: the numbers and events, whoever they are about."""
        return repr((self.start, [(e.kind, e.a, e.b) for e in self.events]))


def outcomes(event: Event, values: set[int]) -> set[int] | None:
    """The values that may come out when any of `values` comes in, over both readings; None if one leaves the range.

    With this, no careless path ever meets a number outside 1..MAX_VALUE or half of an odd one.
    """
    if event.kind == "half" and any(x % 2 for x in values):
        return None
    steps = [event.step(x, misread) for x, misread in product(values, (False, True))]
    if not all(1 <= y <= MAX_VALUE for lines in steps for *_, y in lines):
        return None
    return {lines[-1][-1] for lines in steps}


def draw_event(rng: random.Random, kind: str, who: str) -> Event:
    if kind == "half":
        return Event(kind, 2)
    if kind == "times":
        return Event(kind, rng.choice(list(TIMES)))
    if kind == "bags":
        return Event(kind, rng.randint(2, 5), rng.randint(2, 6))
    return Event(kind, rng.randint(2, 12), who=who if kind in ("bystander", "fewer") else "")


def draw_story(rng: random.Random, guessable_share: float) -> Story:
    """One random story of two to five events, each misconception in it at most once."""
    while True:
        hero, other, third = rng.sample(NAMES, 3)
        kinds = rng.sample(["half", "times", "bystander", "bags"], rng.choice([1, 2, 2, 3]))
        kinds += rng.sample(PLAIN, max(2 - len(kinds), rng.choice([0, 1])))
        rng.shuffle(kinds)
        if rng.random() < 0.35:
            kinds.append("fewer")
        start, events = rng.randint(4, 30), []
        values = {start}
        for kind in kinds:
            drawn = (draw_event(rng, kind, third if kind == "fewer" else other) for _ in range(12))
            fitting = next(((e, out) for e in drawn if (out := outcomes(e, values))), None)
            if fitting is None:
                break
            events.append(fitting[0])
            values = fitting[1]
        else:
            return Story(hero, rng.choice(ITEMS), start, tuple(events), rng.random() < guessable_share)


def draw_problems(split: str, count: int, seed: int, guessable_share: float) -> list[tuple[str, Story]]:
    """`count` different stories of a split. The splits are disjoint because each owns a part of the hash space."""
    rng, stories = random.Random(f"{seed}/{split}"), {}
    while len(stories) < count:
        story = draw_story(rng, guessable_share)
        digest = hashlib.sha256(story.key().encode()).hexdigest()
        if int(digest, 16) % 10 in BUCKETS[split]:
            stories.setdefault(digest[:12], story)
    return list(stories.items())


def careless_choice(story: Story, rng: random.Random) -> tuple[bool, ...]:
    """Which events the careless solver misreads this time."""
    return tuple(rng.random() < MISCONCEPTIONS.get(event.kind, 0.0) for event in story.events)


class WordProblems(Task):
    """The `word_problems` task."""

    def problems(self, split: str) -> list[Problem]:
        size = getattr(self.config, f"{split}_size")
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
        """Check every event of a solution on the value that came into it: (kind, verdict) in story order.

        A verdict is "right", "careless" (the named misconception), "other" (anything else) or "missing". Lines that are
        too many count as one more event, "extra".
        """
        story = story_of(problem)
        lines = response.split("\n")
        x, at, verdicts = story.start, 0, []
        for event in story.events:
            size = len(event.step(1, False))
            written = "\n".join(lines[at : at + size])
            at += size
            if len(lines) < at or x is None:
                verdicts.append((event.kind, "missing"))
                continue
            readings = {event.text(x, True): "careless", event.text(x, False): "right"}
            verdicts.append((event.kind, readings.get(written, "other")))
            last = re.search(r"= (\d+)$", written)
            x = int(last[1]) if last else None
        if len(lines) > at and not lines[at].startswith("Final answer:"):
            verdicts.append(("extra", "other"))
        return verdicts

    def check_lines(self, problem: Problem, response: str) -> list[bool]:
        """Whether each line that is not empty is right *given the lines before it*, [lines]; the final answer is one.

        Whether all is well up to a line is another question: whether it and all lines before it are right.
        """
        story, verdicts = story_of(problem), []
        x, held, todo = story.start, None, [(e, i) for e in story.events for i in range(len(e.step(1, False)))]
        for line in filter(str.strip, response.split("\n")):
            if len(verdicts) > len(todo) or x is None:  # too many, or nothing that it could be right for
                verdicts.append(False)
            elif len(verdicts) == len(todo):
                verdicts.append(line == f"Final answer: {story.answer(x)}")
            else:
                event, part = todo[len(verdicts)]
                lines = event.text(x, False).split("\n")
                wanted = f"Buy: {x} + {held} = {x + held}" if part and held is not None else lines[part]
                verdicts.append(line == wanted and (not part or held is not None))
                last = re.search(r"= (\d+)$", line)
                value = int(last[1]) if last else None
                if part + 1 < len(lines):
                    held = value
                else:
                    x = value
        return verdicts


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
    solution, answer = story.solution((False,) * len(story.events))
    return Problem(name, story.question(), answer, solution, {"story": asdict(story)})


def story_of(problem: Problem) -> Story:
    raw = problem.meta["story"]
    return Story(**{**raw, "events": tuple(Event(**event) for event in raw["events"])})
