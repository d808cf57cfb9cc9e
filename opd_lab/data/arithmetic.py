"""The embedded lab's task: chains of arithmetic modulo 100, worked out in words.

    prompt    start 47 + 8 * 3 ?
    solution  so 47 plus 8 makes 55 , hence 55 times 3 makes 65 , answer 65

The chain is read from left to right, without precedence. It is small, and it has what methods of on-policy
distillation disagree about. Several connectives may open a step and a `Style` says how often each does, so a teacher
and a student who calculate alike still differ there, harmlessly: rock tokens. A step's result may be a slip, and the
chain goes on from it, so on such a prefix a perfect teacher agrees with every token on the way to a wrong answer:
agreement traps. More operations make it harder.

A problem belongs to the split that a digest of its text names, so no prompt can be in two splits, whatever the seeds.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator

MODULUS = 100
SPELLED = {"+": "plus", "-": "minus", "*": "times"}
OPERANDS = (2, 9)  # smallest and largest right operand
CONNECTIVES = ("so", "hence", "thus", "then", "next", "now")
WORDS = ("start", "?", *SPELLED, *SPELLED.values(), "makes", ",", "answer", *CONNECTIVES, *map(str, range(MODULUS)))
SPLITS = ("train", "validation", "test")
PATIENCE = 1000  # draws in a row without a new problem after which the supply counts as exhausted


@dataclass(frozen=True)
class Problem:
    """One question, its answer, and a name that depends on the question alone."""

    prompt: str
    answer: str
    id: str


@dataclass(frozen=True)
class Style:
    """How solutions are written: the weight of each connective, and the probability that a step's result is a slip."""

    connectives: tuple[float, ...]
    slip: float = 0.0

    def __post_init__(self) -> None:
        if len(self.connectives) != len(CONNECTIVES):
            raise ValueError(f"a style weighs the {len(CONNECTIVES)} connectives {CONNECTIVES}, got {self.connectives}")
        if not 0 <= self.slip <= 1:
            raise ValueError(f"the slip probability of a style must be in [0, 1], got {self.slip}; 0 never slips")


TEACHER_STYLE = Style((0.40, 0.30, 0.20, 0.04, 0.03, 0.03))
STUDENT_STYLE = Style((0.03, 0.03, 0.04, 0.20, 0.30, 0.40))


def problems(split: str, operations: tuple[int, ...], count: int, seed: int) -> list[Problem]:
    """`count` distinct problems of a split, the numbers of operations in turn; more of them only adds to the end."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    if not operations or min(operations) < 1:
        raise ValueError(f"operations must name at least one length of chain, each >= 1, got {operations}; try (2, 3)")
    generator = Generator().manual_seed(seed)
    found: dict[str, Problem] = {}
    failures = 0
    while len(found) < count:
        problem = _problem(operations[len(found) % len(operations)], generator)
        if split_of(problem.id) == split and problem.id not in found:
            found[problem.id], failures = problem, 0
        elif (failures := failures + 1) == PATIENCE:
            raise ValueError(
                f"asked for {count} {split} problems with {operations} operations, found only {len(found)}; "
                "ask for fewer problems or more operations"
            )
    return list(found.values())


def split_of(problem_id: str) -> str:
    """One problem in ten is for validation and one for test."""
    return {0: "test", 1: "validation"}.get(int(problem_id, 16) % 10, "train")


def solution(problem: Problem, style: Style, generator: Generator) -> str:
    """The worked solution in a style; after a slip the chain goes on from the wrong number."""
    steps = list(_steps(problem.prompt))
    weights = torch.tensor(style.connectives, dtype=torch.float32)
    openers = torch.multinomial(weights, len(steps), replacement=True, generator=generator).tolist()
    slips = torch.rand(len(steps), generator=generator).tolist()
    numbers = torch.randint(MODULUS, (len(steps),), generator=generator).tolist()
    value, lines = int(problem.prompt.split()[1]), []
    for (symbol, operand), opener, slip, number in zip(steps, openers, slips, numbers, strict=True):
        result = number if slip < style.slip else apply(value, symbol, operand)
        lines.append(f"{CONNECTIVES[opener]} {value} {SPELLED[symbol]} {operand} makes {result} ,")
        value = result
    return " ".join([*lines, f"answer {value}"])


def worked(prompt: str) -> str:
    """The lab's own solution of a problem, for all time the same: in the teacher's style, without a slip."""
    seed = int(_digest(prompt)[:15], 16)
    return solution(Problem(prompt, "", ""), TEACHER_STYLE, Generator().manual_seed(seed))


def grade(response: str, answer: str) -> float:
    """1 where the response ends with `answer <answer>`, to the letter; 0 otherwise."""
    return float(response.split()[-2:] == ["answer", answer])


def first_slip(prompt: str, response: str) -> int | None:
    """The place of the first word that no correct solution has there, whatever its connectives; None without one."""
    value, wanted = int(prompt.split()[1]), []
    for symbol, operand in _steps(prompt):
        result = apply(value, symbol, operand)
        wanted += [CONNECTIVES, value, SPELLED[symbol], operand, "makes", result, ","]
        value = result
    wanted += ["answer", value]
    for place, word in enumerate(response.split()):
        allowed = wanted[place] if place < len(wanted) else ()
        if word not in (allowed if isinstance(allowed, tuple) else (str(allowed),)):
            return place
    return None


def apply(value: int, symbol: str, operand: int) -> int:
    """One operation modulo 100."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[symbol] % MODULUS


def _problem(operations: int, generator: Generator) -> Problem:
    value = _draw(0, MODULUS - 1, generator)
    prompt = f"start {value}"
    for _ in range(operations):
        symbol = tuple(SPELLED)[_draw(0, len(SPELLED) - 1, generator)]
        operand = _draw(*OPERANDS, generator)
        prompt, value = f"{prompt} {symbol} {operand}", apply(value, symbol, operand)
    prompt += " ?"
    return Problem(prompt, str(value), _digest(prompt)[:16])


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()


def _steps(prompt: str) -> Iterator[tuple[str, int]]:
    words = prompt.split()[2:-1]
    return zip(words[::2], map(int, words[1::2]), strict=True)


def _draw(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))
