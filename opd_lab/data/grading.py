"""Is a response right? 1 or 0, and never an exception: nonsense is wrong.

`math_verify` compares mathematics (LaTeX, boxed, numbers). It runs in a process of its own (`math_worker.py`), for a
response like 9^9^9^9 can keep a computer algebra system busy for ever, in code that no signal and no thread interrupts.
The limit is CPU time, not wall time: a busy machine grades like an idle one.
"""

import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from opd_lab.data import arithmetic
from opd_lab.settings import DataSettings

Grader = Callable[[str, str], float]  # response, true answer -> 1 or 0
GRADERS = ("exact", "math_verify", "none")
CPU_SECONDS = 3  # for one response; what takes longer is wrong
PHRASINGS = ("answer {}", "The answer is \\boxed{{{}}}", "{}")  # how a known answer is put to a grader
WRONG = "-7919"  # nobody's answer


class Answered(Protocol):
    @property
    def answer(self) -> str | None: ...


class Rates(NamedTuple):
    """Shares that a grader accepts: of true answers (1 is right), of wrong ones and of empty responses (0 is right)."""

    true: float
    wrong: float


def grader(settings: DataSettings) -> Grader | None:
    """The grader that the data config names; None where nothing is graded."""
    if settings.grader not in GRADERS:
        raise ValueError(f"data.grader must be one of {', '.join(GRADERS)}, got {settings.grader!r}")
    if settings.grader == "none":
        return None
    if settings.kind == "file" and settings.answer_field is None:
        raise ValueError(
            f"data.grader={settings.grader} needs answers, but data.answer_field is null; name the field that "
            "holds them, or set data.grader=none"
        )
    if settings.grader == "exact":
        return arithmetic.grade if settings.kind == "arithmetic" else same_text
    if find_spec("math_verify") is None:
        raise ValueError("data.grader=math_verify needs the package math-verify: pip install math-verify")
    return MathVerify()


def same_text(response: str, answer: str) -> float:
    """1 where the response is the answer, to the letter, but for spaces around it."""
    return float(response.strip() == answer.strip())


class MathVerify:
    """The math-verify library in a process that may die: what kills it is wrong, and a new one starts."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: subprocess.Popen[str] | None = None

    def __call__(self, response: str, answer: str) -> float:
        with self.lock:
            if self.worker is None or self.worker.poll() is not None:
                self.worker = _start(self)
            try:
                verdict = _ask(self.worker, [response, answer])
            except BaseException:  # an interrupt: its late verdict must not be taken for the next one's
                _stop(self.worker)
                raise
            if not verdict:
                _stop(self.worker)
            return float(verdict == "1")


def rates(grade: Grader, examples: Sequence[Answered]) -> Rates:
    """How the grader does on known answers, phrased in the way that it understands best."""
    answers = [example.answer for example in examples if example.answer is not None]
    assert answers, "a self test needs examples with answers"

    def accepted(phrasing: str) -> Rates:
        true = sum(grade(phrasing.format(answer), answer) for answer in answers)
        wrong = sum(max(grade(phrasing.format(WRONG), answer), grade("", answer)) for answer in answers)
        return Rates(true / len(answers), wrong / len(answers))

    return max((accepted(phrasing) for phrasing in PHRASINGS), key=lambda r: r.true - r.wrong)


def self_test(grade: Grader, examples: Sequence[Answered]) -> bool:
    """True where the grader accepts every true answer and no wrong one."""
    return rates(grade, examples) == Rates(1.0, 0.0)


def _start(owner: MathVerify) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("math_worker.py")
    worker = subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", str(script), str(CPU_SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the run alone
    )
    weakref.finalize(owner, _stop, worker)
    if _ask(worker, ["\\boxed{1}", "1"]) != "1":
        raise ValueError("the process that grades with math-verify does not start; its own message stands above")
    return worker


def _ask(worker: subprocess.Popen[str], question: list[str]) -> str:
    """The verdict, empty where the process died."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps(question) + "\n")
    worker.stdin.flush()
    return worker.stdout.readline().strip()


def _stop(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.communicate()
