"""The teacher in this process: states without gradient, and continuations."""

from __future__ import annotations

import torch

from opd_lab.chunk import measure
from opd_lab.methods.base import Ask
from opd_lab.step import Scorer
from opd_lab.teacher.local import LocalTeacher
from opd_lab.types import LOGP_TEACHER, REVERSE_KL
from tests.tiny import make, rollouts

PROMPTS, RESPONSES = [[3, 4, 5], [7], [6, 6]], [[8, 9, 1], [9, 10, 11, 12], [13, 14, 15]]
CUTS = torch.tensor([0, 2, 3])


def test_it_is_what_the_step_and_the_methods_ask_for() -> None:
    teacher = LocalTeacher(make())
    scorer: Scorer = teacher
    ask: Ask = teacher
    assert scorer is ask
    assert (teacher.name, teacher.provides) == ("local", {"sampled", "topk", "full", "hidden", "text"})


def test_its_view_scores_the_generated_tokens_without_gradient_and_dropout() -> None:
    lm = make("llama", attention_dropout=0.9)
    lm.module.train()
    some = rollouts(PROMPTS, RESPONSES)
    view = LocalTeacher(lm).view(some)
    assert not view.hidden_NH.requires_grad
    seen = measure(frozenset({LOGP_TEACHER}), some.response_BT[some.mask_BT], None, view, chunk=4)
    lm.module.eval()
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        logp_LV = lm.module(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        rows.append(logp_LV[len(prompt) - 1 : -1].gather(-1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(seen[LOGP_TEACHER], torch.cat(rows).detach(), atol=1e-5, rtol=0)


def test_no_gradient_reaches_it() -> None:
    student, teacher = make(seed=0), make(seed=1)
    some = rollouts(PROMPTS, RESPONSES)
    view = LocalTeacher(teacher).view(some)
    logp_NV = student.states(some).head.logits(student.states(some).hidden_NH).log_softmax(-1)
    (logp_NV.exp() * (logp_NV - view.head.logits(view.hidden_NH).log_softmax(-1).detach())).sum().backward()
    assert all(p.grad is None for p in teacher.module.parameters())
    assert any(p.grad is not None for p in student.module.parameters())


def test_the_student_as_teacher_gives_no_divergence() -> None:
    lm, some = make(), rollouts(PROMPTS, RESPONSES)
    with torch.no_grad():
        states = lm.states(some)
    seen = measure(
        frozenset({REVERSE_KL}), some.response_BT[some.mask_BT], states, LocalTeacher(lm).view(some), chunk=4
    )
    torch.testing.assert_close(seen[REVERSE_KL], torch.zeros(10), atol=1e-6, rtol=0)


def test_continuations_begin_where_the_response_was_cut() -> None:
    """A teacher so sure of itself that it has one continuation: what `generate` gives for prompt + response[:cut]."""
    lm = make("llama", seed=3)
    with torch.no_grad():
        lm.module.lm_head.weight *= 1000
    texts = LocalTeacher(lm).continue_(rollouts(PROMPTS, RESPONSES, extra=2), CUTS, samples=2, max_tokens=6)
    for (prompt, response), cut, answers in zip(zip(PROMPTS, RESPONSES), CUTS.tolist(), texts, strict=True):
        prefix = prompt + response[:cut]
        out_1L = lm.module.generate(torch.tensor([prefix]), do_sample=False, max_new_tokens=6)  # pyright: ignore
        assert answers == [lm.tokenizer.decode(out_1L[0, len(prefix) :], skip_special_tokens=True)] * 2


def test_what_is_drawn_depends_on_uid_cut_and_seed_alone() -> None:
    lm, some = make(), rollouts(PROMPTS, RESPONSES)
    some.uid_B.copy_(torch.tensor([5, 6, 7]))
    teacher = LocalTeacher(lm)
    texts = teacher.continue_(some, CUTS, samples=3, max_tokens=8)
    assert texts == teacher.continue_(some, CUTS, samples=3, max_tokens=8)
    turned_B = torch.tensor([2, 0, 1])
    assert [texts[b] for b in turned_B.tolist()] == teacher.continue_(
        some.rows(turned_B), CUTS[turned_B], samples=3, max_tokens=8
    )
    assert texts != LocalTeacher(lm, seed=1).continue_(some, CUTS, samples=3, max_tokens=8)
    assert len(set(texts[0])) > 1
    some.uid_B[0] = 8
    others = teacher.continue_(some, CUTS, samples=3, max_tokens=8)
    assert others[0] != texts[0] and others[1:] == texts[1:]


def test_frequencies_after_the_cut_are_the_teachers_probabilities() -> None:
    lm, some = make("qwen2_tied"), rollouts([[3, 4, 5]], [[8, 9]])
    (texts,) = LocalTeacher(lm).continue_(some, torch.tensor([1]), samples=4000, max_tokens=1)
    p_V = lm.module(input_ids=torch.tensor([[3, 4, 5, 8]])).logits[0, -1].softmax(-1).detach()
    likely = int(p_V[3:20].argmax()) + 3  # an id with a text
    share = texts.count(str(lm.tokenizer.decode([likely]))) / 4000
    assert abs(share - float(p_V[likely])) < 4 * (0.25 / 4000) ** 0.5
