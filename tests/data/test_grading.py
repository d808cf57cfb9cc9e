"""Graders know right from wrong, survive nonsense, and give up in bounded CPU time."""

import threading
from types import SimpleNamespace

import pytest

from opd_lab.data import arithmetic, grading
from opd_lab.data.grading import MathVerify, rates, same_text, self_test


def answers(*values: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(answer=value) for value in values]


@pytest.fixture(scope="module")
def math_verify():
    grade = MathVerify()
    yield grade


@pytest.mark.parametrize(
    "response, answer, verdict",
    [
        (r"so the answer is \boxed{72}.", "72", 1.0),
        ("48 + 24 = 72 clips.", "72", 1.0),
        ("It costs 1,234 dollars", "1234", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{2}{4}}", "1/2", 1.0),
        (r"$(3, \frac{\pi}{2})$", r"\left( 3, \frac{\pi}{2} \right)", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1.0),
        ("first \\boxed{5}\nNo, 6 was meant: \\boxed{7}", "7", 1.0),
        (r"\boxed{5}, no: {6}, so \boxed{\frac{7}{2}} {as} said", "3.5", 1.0),
        (r"\boxed{73}", "72", 0.0),
        (r"\boxed{72}, no: \boxed{73}", "72", 0.0),
        (r"\boxed{\frac{1}{3}}", "0.5", 0.0),
        (r"72, or rather \boxed{73}", "72", 0.0),
        ("", "72", 0.0),
        ("no number here", "72", 0.0),
    ],
)
def test_mathematics_is_compared_not_spelling(math_verify, response, answer, verdict):
    assert math_verify(response, answer) == verdict


@pytest.mark.parametrize(
    "response",
    ["\x00\ud800\r\n\u2028", "\\boxed{" * 500, "((((" * 5000, "$" * 1000, r"\frac{1}{0}", "\\", "{}", "None", "[]"],
    ids=range(9),
)
def test_nonsense_is_wrong(math_verify, response):
    assert math_verify(response, "72") == 0.0
    assert math_verify(r"\boxed{72}", "72") == 1.0


def test_what_never_ends_is_wrong_and_the_next_response_is_graded(monkeypatch):
    monkeypatch.setattr(grading, "CPU_SECONDS", 1)
    grade = MathVerify()
    assert grade(r"\boxed{9^{9^{9^{9}}}}", "1") == 0.0
    assert grade(r"\boxed{1}", "1") == 1.0
    assert grade.worker is not None
    grade.worker.kill()
    grade.worker.wait()
    assert grade(r"\boxed{2}", "2") == 1.0


def test_an_interrupt_does_not_shift_the_verdicts(math_verify, monkeypatch):
    def interrupted(worker, question):
        worker.stdin.write('["\\\\boxed{1}", "1"]\n')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        assert math_verify(r"\boxed{1}", "1") == 1.0
        patch.setattr(grading, "_ask", interrupted)
        math_verify(r"\boxed{1}", "1")
    assert math_verify(r"\boxed{1}", "2") == 0.0


def test_threads_may_grade(math_verify):
    verdicts: dict[int, float] = {}

    def grade(n: int) -> None:
        verdicts[n] = math_verify(rf"\boxed{{{n}}}", str(n - n % 2))

    threads = [threading.Thread(target=grade, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {n: float(n % 2 == 0) for n in range(10)}


def test_the_self_test_passes_graders_that_know_right_from_wrong(math_verify):
    assert self_test(arithmetic.grade, answers("7", "55"))
    assert self_test(same_text, answers("7", "the cat"))
    assert self_test(math_verify, answers("7", r"\frac{1}{2}", r"\text{east}", "1,000"))


def test_the_self_test_fails_graders_that_do_not():
    assert rates(lambda response, answer: 1.0, answers("7")) == (1.0, 1.0)
    assert rates(lambda response, answer: 0.0, answers("7")) == (0.0, 0.0)
    assert rates(lambda response, answer: float(answer in response), answers("7", "")) == (1.0, 0.5 + 0.5)
    assert rates(lambda response, answer: float(response == answer == "7"), answers("7", "8")) == (0.5, 0.0)
    assert not self_test(lambda response, answer: 1.0, answers("7"))
