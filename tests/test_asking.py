"""What a method asks in `consult` is declared, counted, and cut where it says."""

import pytest
import torch

from opd_lab.asking import Asking
from opd_lab.chunk import UndeclaredSignalError
from opd_lab.methods.base import Ask
from opd_lab.teacher.local import LocalTeacher
from tests.tiny import make, rollouts

HOW = {"samples": 2, "max_tokens": 3, "temperature": 1.0, "top_p": 1.0, "seed": (0,)}


def asking(declared: bool = True) -> Asking:
    lm = make()
    return Asking(LocalTeacher(lm) if declared else None, lm, "Mine")


def test_text_must_be_declared() -> None:
    ask: Ask = asking(declared=False)
    with pytest.raises(UndeclaredSignalError, match=r"text is not in needs\(\) of Mine; add text=True"):
        ask.continue_(rollouts([[3]], [[4]]), torch.tensor([0]), **HOW)


def test_what_is_asked_is_added_up() -> None:
    ask, some = asking(), rollouts([[3, 4, 5], [7]], [[8, 9, 1], [9, 10]], extra=2)
    written = ask.continue_(some, torch.tensor([2, 0]), **HOW)
    expected = {"teacher_queries_count": 2, "teacher_prefix_tokens": 3 + 2 + 1 + 0, "teacher_cached_tokens": 0}
    assert ask.cost == expected | {"teacher_generated_tokens": sum(w.tokens for w in written)}
    ask.continue_(some, torch.tensor([0, 1]), **HOW)
    assert ask.cost["teacher_queries_count"] == 4 and ask.cost["teacher_prefix_tokens"] == 6 + 5
    ask.continue_(some.rows(torch.tensor([0, 0])), torch.tensor([1, 3]), **HOW)
    assert ask.cost["teacher_cached_tokens"] == 4, "the longer prefix, of 6, holds the shorter"


def test_a_stretch_of_the_response_as_text() -> None:
    """Ids 3, 4, ... read a, b, ...; the end of the response is no text, wherever the stretch is cut."""
    ask, some = asking(), rollouts([[3, 4, 5], [7]], [[8, 9, 1], [9, 10]], extra=2)
    assert ask.texts(some, torch.tensor([0, 0]), torch.tensor([2, 1])) == ["f g", "g"]
    assert ask.texts(some, torch.tensor([1, 1]), torch.tensor([3, 2])) == ["g", "h"]
    assert ask.texts(some, torch.tensor([1, 1]), torch.tensor([1, 1])) == ["", ""]


def test_the_first_tokens_of_a_text() -> None:
    assert [asking().shortened("a b c", n) for n in (1, 2, 3, 9)] == ["a", "a b", "a b c", "a b c"]
