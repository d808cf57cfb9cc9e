"""A student and a teacher that can be compared token by token: one tokenizer, one vocabulary, one end of text.

Ids that mean different strings, or logits of different width, give a wrong divergence without any crash, and a student
that learns an end of text it does not stop at grows without bounds. So all three are compared by content, before the
first token. A base and a chat model end with different ids; that is one event for both (arXiv 2605.31159, where it
comes from, leaves open whether the mass on the other's end is dropped; here it is added, so none is lost).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from opd_lab.models import LM, tokenizer_size

STOP_EVENTS = ("merged", "separate")


def match(student: LM, teacher: LM, stop_ids: list[int] | None, stop_event: str) -> tuple[LM, LM, list[str]]:
    """Both models over the same ids, stopping at the same ids, and notes of what that took. `stop_event` says what
    becomes of ends that only one of them has: one event for both models, written as the student's own end, or each a
    token of its own that ends a response."""
    if stop_event not in STOP_EVENTS:
        raise ValueError(f"model.stop_event must be one of {', '.join(STOP_EVENTS)}, got {stop_event}")
    _same_tokenizer(student, teacher)
    notes = []
    templates = [str(lm.tokenizer.chat_template or "") for lm in (student, teacher)]
    if templates[0] != templates[1]:
        was = [hashlib.sha256(text.encode()).hexdigest()[:8] if text else "none" for text in templates]
        notes.append(
            f"chat templates differ (student {was[0]}, teacher {was[1]}): both models read the student's prompts"
        )
    if student.vocabulary != teacher.vocabulary:
        shared = tokenizer_size(student.tokenizer)
        notes.append(
            f"logits have {student.vocabulary} columns (student) and {teacher.vocabulary} (teacher): "
            f"both are cut to the {shared} ids of the shared tokenizer, the rest is padding"
        )
        student, teacher = replace(student, vocabulary=shared), replace(teacher, vocabulary=shared)
    if stop_ids is not None:
        if not stop_ids or min(stop_ids) < 0 or max(stop_ids) >= student.vocabulary:
            raise ValueError(f"model.stop_ids must name ids below {student.vocabulary}, at least one, got {stop_ids}")
        student, teacher = (replace(lm, stop_ids=frozenset(stop_ids)) for lm in (student, teacher))
        return student, teacher, notes
    ours, theirs = frozenset(student.one_end) | student.stop_ids, teacher.stop_ids
    if not ours or not theirs:
        shown = {lm.name: _spelled(lm, lm.stop_ids) for lm in (student, teacher)}
        raise ValueError(
            f"student and teacher must end a response at some id, got {shown}; set model.stop_ids to the ids that end "
            "a response"
        )
    if ours != theirs:
        notes.append(
            f"student and teacher end a response at different ids ({_spelled(student, ours)} and "
            f"{_spelled(teacher, theirs)}): model.stop_event={stop_event}"
        )
    if stop_event == "separate" or not (student.one_end or ours != theirs):
        student, teacher = (replace(lm, stop_ids=ours | theirs) for lm in (student, teacher))
    else:
        end = student.end_id
        one_end = (end, *sorted((ours | theirs) - {end}))
        student, teacher = (replace(lm, stop_ids=frozenset({end}), one_end=one_end) for lm in (student, teacher))
    return student, teacher, notes


def _same_tokenizer(student: LM, teacher: LM) -> None:
    ours, theirs = (lm.tokenizer.get_vocab() for lm in (student, teacher))
    ours, theirs = ({i: token for token, i in vocab.items()} for vocab in (ours, theirs))
    differ = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if differ:
        first = "; ".join(f"id {i}: {ours.get(i)!r} and {theirs.get(i)!r}" for i in differ[:3])
        raise ValueError(
            f"student and teacher must share one tokenizer, got {len(differ)} ids that differ ({first}); "
            "choose two models of one family, or a method that asks the teacher for text alone"
        )
    roles = {getattr(lm.tokenizer, f"{role}_token_id") for lm in (student, teacher) for role in ("eos", "pad")}
    special = set(student.tokenizer.all_special_ids) ^ set(teacher.tokenizer.all_special_ids)
    if special - roles:  # which special token ends or pads is another question
        raise ValueError(
            f"student and teacher must agree on special tokens, got these only in one: "
            f"{_spelled(student, special - roles)}; make the tokenizer files equal"
        )


def _spelled(lm: LM, ids: Iterable[int]) -> str:
    return ", ".join(f"{i} = {lm.tokenizer.convert_ids_to_tokens(i)}" for i in sorted(ids)) or "none"
