"""The teacher in this process: states without gradient, and continuations."""

from __future__ import annotations

import torch
from torch import Tensor

from opd_lab.chunk import measure
from opd_lab.methods.base import Continued, Writer
from opd_lab.rollout.torch_engine import filtered
from opd_lab.step import Scorer
from opd_lab.teacher.local import LocalTeacher
from opd_lab.types import LOGP_TEACHER, REVERSE_KL, Behavior, Rollouts
from tests.tiny import make, rollouts

PROMPTS, RESPONSES = [[3, 4, 5], [7], [6, 6]], [[8, 9, 1], [9, 10, 11, 12], [13, 14, 15]]
CUTS = torch.tensor([0, 2, 3])


def asked(
    teacher: LocalTeacher, some: Rollouts, cuts_B: Tensor, samples: int, max_tokens: int, seed: int = 0, **how: float
):
    plain = {"temperature": 1.0, "top_p": 1.0} | how
    return teacher.continue_(some, cuts_B, samples=samples, max_tokens=max_tokens, seed=(seed,), **plain)


def texts_of(*args, **how) -> list[list[str]]:
    return [written.texts for written in asked(*args, **how)]


def test_it_is_what_the_step_and_the_methods_ask_for() -> None:
    teacher = LocalTeacher(make())
    scorer: Scorer = teacher
    writer: Writer = teacher
    assert scorer is writer
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
    texts = texts_of(LocalTeacher(lm), rollouts(PROMPTS, RESPONSES, extra=2), CUTS, 2, 6)
    for (prompt, response), cut, answers in zip(zip(PROMPTS, RESPONSES), CUTS.tolist(), texts, strict=True):
        prefix = prompt + response[:cut]
        out_1L = lm.module.generate(torch.tensor([prefix]), do_sample=False, max_new_tokens=6)  # pyright: ignore
        assert answers == [lm.tokenizer.decode(out_1L[0, len(prefix) :], skip_special_tokens=True)] * 2


def test_what_is_drawn_depends_on_uid_cut_and_seed_alone() -> None:
    lm, some = make(), rollouts(PROMPTS, RESPONSES)
    some.uid_B.copy_(torch.tensor([5, 6, 7]))
    teacher = LocalTeacher(lm)
    texts = texts_of(teacher, some, CUTS, 3, 8)
    assert texts == texts_of(teacher, some, CUTS, 3, 8)
    turned_B = torch.tensor([2, 0, 1])
    turned = texts_of(teacher, some.rows(turned_B), CUTS[turned_B], 3, 8)
    assert [texts[b] for b in turned_B.tolist()] == turned
    assert texts != texts_of(teacher, some, CUTS, 3, 8, seed=1)
    assert len(set(texts[0])) > 1
    some.uid_B[0] = 8
    others = texts_of(teacher, some, CUTS, 3, 8)
    assert others[0] != texts[0] and others[1:] == texts[1:]


def test_frequencies_after_the_cut_are_the_teachers_probabilities() -> None:
    lm, some = make("qwen2_tied"), rollouts([[3, 4, 5]], [[8, 9]])
    (texts,) = texts_of(LocalTeacher(lm), some, torch.tensor([1]), 4000, 1)
    p_V = lm.module(input_ids=torch.tensor([[3, 4, 5, 8]])).logits[0, -1].softmax(-1).detach()
    likely = int(p_V[3:20].argmax()) + 3  # an id with a text
    share = texts.count(str(lm.tokenizer.decode([likely]))) / 4000
    assert abs(share - float(p_V[likely])) < 4 * (0.25 / 4000) ** 0.5


def test_temperature_and_top_p_are_those_asked_for() -> None:
    lm, some = make("qwen2_tied"), rollouts([[3, 4, 5]], [[8, 9]])
    (texts,) = texts_of(LocalTeacher(lm), some, torch.tensor([1]), 4000, 1, temperature=0.5, top_p=0.8)
    logits_1V = lm.module(input_ids=torch.tensor([[3, 4, 5, 8]])).logits[:, -1, : lm.vocabulary].detach()
    p_V = filtered(logits_1V, Behavior(temperature=0.5, top_p=0.8))[0].exp()
    likely = int(p_V[3:20].argmax()) + 3
    share = texts.count(str(lm.tokenizer.decode([likely]))) / 4000
    assert abs(share - float(p_V[likely])) < 4 * (0.25 / 4000) ** 0.5
    assert int((p_V == 0).sum()) > 0


def test_several_cuts_of_one_rollout_and_the_tokens_written() -> None:
    lm, some = make(), rollouts(PROMPTS, RESPONSES)
    both = asked(LocalTeacher(lm), some.rows(torch.tensor([1, 1])), torch.tensor([1, 3]), 3, 8)
    alone = asked(LocalTeacher(lm), some.rows(torch.tensor([1])), torch.tensor([3]), 3, 8)
    assert both[1] == alone[0]
    assert both[0].texts != both[1].texts
    assert isinstance(both[0], Continued)
    certain = make("llama", seed=3)
    with torch.no_grad():
        certain.module.lm_head.weight.zero_()
        certain.module.lm_head.weight[1] = 0.0  # every id alike: 24 ids, one of them the end
    (written,) = asked(LocalTeacher(certain), some.rows(torch.tensor([0])), torch.tensor([0]), 2000, 1)
    assert written.tokens == 2000, "one token each, the end counts as one"


def test_nested_prefixes_are_read_once_and_counted() -> None:
    """Prefixes of 3, 5 and 6 tokens of row 0, one of 1 token of row 1. Read are the 6 and the 1."""
    lm, some = make(), rollouts([[3, 4, 5], [7]], [[8, 9, 10], [9, 10, 11]], extra=1)
    row_C, cut_C = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 2, 0, 3])
    together = asked(LocalTeacher(lm), some.rows(row_C), cut_C, 4, 6)
    alone = asked(LocalTeacher(lm, decode_rows=1), some.rows(row_C), cut_C, 4, 6)
    assert [w.texts for w in together] == [w.texts for w in alone]
    assert [w.tokens for w in together] == [w.tokens for w in alone]
    assert [w.cached for w in together] == [3, 5, 0, 0]
    assert [w.cached for w in alone] == [0, 0, 0, 0]
    split = asked(LocalTeacher(lm, decode_rows=8), some.rows(row_C), cut_C, 4, 6)
    assert [w.texts for w in split] == [w.texts for w in alone]
    assert [w.cached for w in split] == [0, 5, 0, 0], "the batch that decodes the 3 reads them once more"
