"""MBPP (Austin et al., arXiv 2108.07732) and HumanEval (Chen et al., arXiv 2107.03374): programs that must pass tests.

A program is what stands in a fenced block (``` or ~~~, of Python or of nothing): of the whole blocks the last that
defines what the tests call, else the last. Without a fence it is a response that begins as code does, to the first line
that is none. `flexible` also takes a block that is not closed, and code behind prose. No block is joined to another.

Programs run in `sandbox.py`, whose docstring says what that covers; they have the standard library alone.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

from ...files import resolve
from ...settings import TaskConfig
from ...tasks.base import Problem
from ...tasks.records import RecordTask, is_file, read_file, read_hub
from .sandbox import Job, Sandbox

PROMPT = (
    "Write Python code for the task below. Reason step by step first. When you are done, finish with the whole "
    "program, and nothing that calls it, in one block between ```python and ```.\n\nTask: {question}"
)
# What Austin et al. put between the task and its three tests.
QUESTION = "{text}\nYour code should pass these tests:\n\n{tests}"
HEADER = "Complete this function.\n\n```python\n{prompt}\n```"
OFFICIAL = {"train": range(601, 975), "dev": range(511, 601), "test": range(11, 511)}  # 1-10 are for few-shot prompts
_FENCE = re.compile(r"([ \t]{0,8})(`{3,}|~{3,})[ \t]*([\w+-]*)")
_PYTHON = ("", "py", "python", "python3")
# A line that starts in the first column as code and prose seldom does.
_CODE = re.compile(
    r"(?:def|class|async def|if|for|while|with|elif|else|try|except|finally|match)\b[^\n]*[:(\[{,\\]\s*(?:#.*)?$"
    r"|(?:if|elif|else|for|while|try|with)\b[^\n]*:\s{0,4}(?:return|raise|continue|break|pass)\b"
    r"|import [\w.]+(?:\s*,|\s+as\b|\s*$)|from [\w.]+ import\b|@\w|#|return\b|assert\b|raise\b|pass\s*$|global\b|del\b"
    r"|[\])}]|\"{3}|'{3}|\w[\w.]{0,80}(?:\[[^\]\n]{0,80}\])?\s{0,4}(?:[-+*/%&|^@]{0,2}=(?!=)|\(|:\s?\w[^=\n]{0,80}=)"
    r"|\w{1,80}(?:\s?,\s?\w{1,80}){1,20}\s{0,4}="
)


def blocks(response: str) -> Iterator[tuple[str, bool]]:
    """(code, whole) of every fenced block that may be Python; `whole` is False for one that is not closed."""
    fence, code, kept, indent = "", [], False, ""
    for line in response.split("\n"):
        match = _FENCE.match(line)
        if fence and match and match[2].startswith(fence) and not line[match.end(2) :].strip():
            if kept:
                yield "\n".join(code), True
            fence = ""
        elif fence:
            code.append(line.removeprefix(indent))
        elif match:
            indent, fence, code, kept = match[1], match[2], [], match[3].lower() in _PYTHON
    if fence and kept:
        yield "\n".join(code), False


def unfenced(response: str, body: bool = False, anywhere: bool = False) -> str | None:
    """The lines from the first of code to the last before one that is none; `body`: it may start inside a function.

    Prose may come before only with `anywhere`. Only the first column is looked at, outside triple quotes.
    """
    found: list[str] = []
    quoted = False
    for line in response.split("\n"):
        starts = bool(_CODE.match(line)) or (body and line[:1] in (" ", "\t"))
        if not found and line.strip() and not starts and not anywhere:
            return None
        if found or (line.strip() and starts):
            if not quoted and line.strip() and line[0] not in " \t" and not starts:
                break
            found.append(line)
            quoted ^= (line.count('"""') + line.count("'''")) % 2 == 1
    return "\n".join(found) if found else None


def defines(code: str, name: str) -> bool:
    return (
        re.search(rf"^(?:(?:async\s+)?def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.M) is not None
    )


def called(tests: str) -> tuple[str, ...]:
    """The names that tests take from the program: free ones, and a builtin's only where there is no other.

    A program may not lend the tests its own `set` or `sorted`, which would see what is expected; but "sum" is also what
    some upstream tests call. Nor does it lend them its own `math` (see `modules`). Raises ValueError for tests that are
    no Python.
    """
    nodes, free = _parsed(tests)
    borrowed = modules(tests)
    own = tuple(name for name in free if not hasattr(builtins, name) and name not in borrowed)
    found = own or tuple(n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))[:1]
    if not found:
        raise ValueError("the tests call nothing of the program")
    return found


def modules(tests: str) -> dict[str, list[str]]:
    """The modules of the standard library that tests use and do not import, each with the dotted names below it.

    A free name is a module's where the tests take nothing but attributes from it: `math.isclose(f(2), 3)`. One that
    they call, as in `copy(x)`, is the program's.
    """
    nodes, free = _parsed(tests)
    below = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}
    otherwise = {n.id for n in nodes if isinstance(n, ast.Name) and id(n) not in below}
    found = {name: [] for name in free if name in sys.stdlib_module_names and name not in otherwise}
    for node in nodes:
        dotted = ast.unparse(node.value) if isinstance(node, ast.Attribute) else ""
        root, *rest = dotted.split(".")
        if rest and root in found and all(part.isidentifier() for part in rest):
            found[root].append(dotted)
    return found


def imports(tests: str) -> str:
    """Source that imports `modules`, but for those that are there. What is below one need not be a module itself."""
    lines = []
    for name, below in modules(tests).items():
        lines.append(f"if {name!r} not in globals():\n    import {name}\n")
        lines += [f"try:\n    import {dotted}\nexcept ImportError:\n    pass\n" for dotted in dict.fromkeys(below)]
    return "".join(lines)


def _parsed(tests: str) -> tuple[list[ast.AST], dict[str, None]]:
    """The nodes of tests, and the names that they use and do not bind. Raises ValueError."""
    try:
        nodes = list(ast.walk(ast.parse(tests)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are no Python: {error}") from None
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {
        (a.asname or a.name).split(".")[0] for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
    }
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    bound |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    return nodes, dict.fromkeys(n.id for n in nodes if isinstance(n, ast.Name) and n.id not in bound)


def indented(body: str) -> str:
    """A function's body at four spaces, where a response began in another column, or lost that of its first line."""
    lines = body.split("\n")
    first = next(i for i, line in enumerate(lines) if line.strip())
    widths = [len(line) - len(line.lstrip()) for line in lines[first:] if line.strip()]
    short = 4 - widths[0]
    if short <= 0:
        return body
    opens = lines[first].rstrip().endswith(":") and widths[1:2] == [widths[0] + 4]
    if len(widths) > 1 and min(widths[1:]) >= 4 and not opens:
        return "\n".join([*lines[:first], " " * short + lines[first], *lines[first + 1 :]])
    return "\n".join(" " * short + line if line.strip() else line for line in lines)


def plain_lines(text: Any) -> str:
    return text.replace("\r\n", "\n")


class Code(RecordTask):
    """What both tasks share.

    A problem's `meta` has `tests`, the `names` they call, what runs `before` them and, of HumanEval, the `prompt`.
    """

    template = PROMPT
    graded_on: ClassVar[str] = '"task_id": 11'
    own_processes = True  # the sandbox's

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self.passed: dict[bytes, bool] = {}  # verdicts by what was run

    @cached_property
    def sandbox(self) -> Sandbox:
        return Sandbox(self.config.execution)

    def problem(self, name: str, record: dict) -> Problem:
        return _humaneval(record) if "entry_point" in record else _mbpp(record)

    def belongs(self, split: str, record: dict) -> bool:
        """MBPP's official splits, by task_id, so that they may all be in one file; other numbers belong anywhere."""
        number = record.get("task_id")
        ours = "test_list" in record and type(number) is int and 1 <= number <= 974
        return not ours or number in OFFICIAL[split]

    @cached_property
    def named(self) -> dict[str, Problem]:
        """Every problem of the sources by its task_id, of whatever split."""
        given = [*self.config.train, *self.config.dev, *self.config.test]
        found = {}
        for source in dict.fromkeys(given or self.everything):
            rows = read_file(resolve(source), "--data") if is_file(source) else read_hub(source, "--data")
            for place, record in rows:
                problem = self._checked(place, place, record)
                found[problem.meta["task_id"]] = problem
        return found

    def posed(self, name: str, gold: str, record: dict[str, Any]) -> Problem:
        """The problem of a record to grade: it has the upstream fields itself, or a `task_id`. Raises ValueError."""
        if "test_list" in record or "entry_point" in record:
            return self.problem(name, {"text": "-", "code": "-", "canonical_solution": "-", "task_id": name, **record})
        if record.get("task_id") is None:
            raise ValueError(
                'expected {"response": "text", "task_id": 11}, or the upstream fields (MBPP: "test_list") instead'
            )
        problem = self.named.get(str(record["task_id"]))
        if problem is None:
            raise ValueError(f"no problem has the task_id {record['task_id']!r}")
        return problem

    def extract(self, response: str, problem: Problem, flexible: bool = False) -> str | None:
        header = problem.meta.get("prompt", "")
        names = problem.meta.get("names", ())
        response = plain_lines(response)
        found = list(blocks(response))
        whole = [code for code, closed in found if closed and code.strip()]
        if whole:
            wanted = [code for code in whole if any(defines(code, name) for name in names)]
            return _joined(header, names, (wanted or whole)[-1])
        code = unfenced(response, body=bool(header))
        if flexible and not code:
            code = found[-1][0] if found else unfenced(response, anywhere=True)
        return _joined(header, names, code) if code and code.strip() else None

    def equal(self, answer: str, problem: Problem) -> bool:
        return self.equal_all([answer], [problem])[0]

    def equal_all(self, answers: list[str], problems: list[Problem]) -> list[bool]:
        """Whether the programs pass their problems' tests; the same program on the same tests is run once.

        Raises:
            Refused: programs cannot be run in isolation here.
        """
        jobs = [
            Job(a, p.meta["tests"], tuple(p.meta["names"]), p.meta["before"])
            for a, p in zip(answers, problems, strict=True)
        ]
        keys = [hashlib.sha256(repr(job).encode("utf-8", "surrogatepass")).digest() for job in jobs]
        missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in self.passed}
        self.passed |= zip(missing, self.sandbox(list(missing.values())), strict=True)
        return [self.passed[key] for key in keys]

    def vote(self, answer: str) -> str:
        """A program without lines of comments, spaces at the ends and empty lines: maj@k counts equal programs."""
        lines = (line.rstrip() for line in answer.split("\n"))
        return "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))


def _joined(header: str, names: tuple[str, ...], code: str) -> str:
    """A whole program: HumanEval's header before a body alone, or what stands above it before a whole function."""
    if not header:
        return code
    if not defines(code, names[0]):
        return header.rstrip() + "\n" + indented(code)
    above = re.split(rf"^def\s+{re.escape(names[0])}\b", header, maxsplit=1, flags=re.M)[0]
    return f"{above.rstrip()}\n\n{code}" if above.strip() else code


def _texts(record: dict, *fields: str) -> list[str]:
    missing = [field for field in fields if not isinstance(record.get(field), str) or not record[field].strip()]
    if missing:
        raise ValueError(f"{missing[0]} must be text that is not empty")
    return [plain_lines(record[field]) for field in fields]


def _mbpp(record: dict) -> Problem:
    tests, setup = record.get("test_list"), record.get("test_setup_code") or ""
    if not isinstance(tests, list) or not tests or not all(isinstance(t, str) and t.strip() for t in tests):
        raise ValueError("test_list must be a list of assertions as text, at least one")
    if not isinstance(setup, str) or type(record.get("task_id")) not in (int, str):
        raise ValueError("expected a task_id, and test_setup_code as text")
    text, code = _texts(record, "text", "code")
    tests = [plain_lines(t).strip() for t in tests]
    source = "\n".join([plain_lines(setup), *tests])
    number = str(record["task_id"])
    meta = {"task_id": number, "tests": source, "names": list(called(source)), "before": imports(source)}
    question = QUESTION.format(text=text.strip(), tests="\n".join(tests))
    return Problem(f"mbpp-{number}", question, code, f"```python\n{code.strip()}\n```", meta)


def _humaneval(record: dict) -> Problem:
    prompt, tests, name = _texts(record, "prompt", "test", "entry_point")
    gold = record.get("canonical_solution")
    if not isinstance(gold, str) or type(record.get("task_id")) not in (int, str):
        raise ValueError("expected a task_id, and canonical_solution as text")
    if not name.isidentifier() or not defines(prompt, name):
        raise ValueError(f"the prompt does not define the entry_point {name!r}")
    source = f"{tests}\ncheck({name})"
    called(source)
    # Functions of the prompt that the tests call (`poly` in HumanEval/32) are the prompt's, whatever a program defines.
    before = f"{prompt}\n{imports(source)}" if modules(source) else prompt
    number = str(record["task_id"])
    meta = {"task_id": number, "tests": source, "names": [name], "before": before, "prompt": prompt}
    whole = prompt + plain_lines(gold)
    return Problem(number, HEADER.format(prompt=prompt.rstrip()), whole, f"```python\n{whole.strip()}\n```", meta)


class MBPP(Code):
    """The `mbpp` task: zero-shot, with the three tests in the prompt. Its splits are the official ones.

    The upstream record is {"text", "code", "task_id", "test_list", "test_setup_code"}.
    """

    sources: ClassVar[dict[str, list[str]]] = {
        split: [f"google-research-datasets/mbpp:full:{split}"] for split in ("train", "test")
    }
    everything: ClassVar[list[str]] = [
        f"google-research-datasets/mbpp:full:{split}" for split in ("train", "validation", "test", "prompt")
    ]
    fields = ("text", "code", "task_id", "test_list")


class HumanEval(Code):
    """The `humaneval` task: trained on MBPP, tested on HumanEval. The prompt is a function's header and docstring.

    The upstream record is {"task_id", "prompt", "entry_point", "canonical_solution", "test"}.
    """

    sources: ClassVar[dict[str, list[str]]] = {
        "train": MBPP.sources["train"],
        "test": ["openai/openai_humaneval::test"],
    }
    everything: ClassVar[list[str]] = sources["test"]
    fields = ("task_id",)
