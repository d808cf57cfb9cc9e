"""`opd-lab analyze rock select RUN`: which token types are rocks, and a method that freezes them.

token_table.parquet   a row per type that occurs: id, text, count, kl_sum_nats, kl_mean_nats, kl_sd_nats,
                      lower_bound_nats, shrunk_mean_nats and shrunk_lower_nats (empirical Bayes), score (what it was
                      ranked by), entropy_student, entropy_teacher (means, nats), kl_share, token_share, enrichment,
                      group (rock | high_kl | random | empty), control (bool), special (bool)
method/rock_selected.yaml, method/rock_control.yaml    settings for `opd-lab run --config-dir ... method=rock_selected`

Rocks come from the selecting half of the prompts, at the last checkpoint of the corpus. The comparison groups: high_kl,
the highest mean KL among the others (D), and random types of what is left. The control has for each rock another type,
as frequent as possible. Special tokens and stop ids never enter a set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opd_lab.analyze.outcome import Frame, Outcome, frame, stored
from opd_lab.analyze.rock import figures
from opd_lab.analyze.rock.corpus import SELECT, ends, occurrences
from opd_lab.analyze.selectors import Shares, empirical_bayes, matched_control, shares
from opd_lab.analyze.subject import Subject, open_run
from opd_lab.methods.rock_scores import SCORES, TypeTable, lower_bound, tabulate, top
from opd_lab.parts import tokenizer_digest

FROM_TABLES = {  # scores that another question has stored: its table, the column, the command
    "context": ("context", "context_score", "rock context"),
    "recalcitrance": ("quadrants", "rank_score", "rock quadrants"),
    "gradient_norm": ("gradients", "total_norm", "rock gradients"),
    "gradient_alignment": ("gradients", "contribution", "rock gradients"),
}
COMPUTED = SCORES | {
    "lower_bound_sum": lambda table: table.count_V * lower_bound(table).clamp(min=0),
    "shrunk_lower": lambda table: empirical_bayes(table).lower_V,
}
CHOICES = (*COMPUTED, *FROM_TABLES)
SHOWN = 20  # rocks printed
MATCHED = 0.2  # relative difference of tokens from which rocks and control are not called matched


def answer(
    run: Path,
    *,
    score: str,
    k: int | None,
    coverage: float,
    min_count: int,
    exclude_most_frequent: int,
    protect: list[int],
    high_kl: int | None,
    random: int,
    joint: Path | None,
    after: int | None,
    seed: int,
) -> Outcome:
    subject = open_run(run)
    _, last = ends(run, None, after)
    rows = occurrences(run, half=SELECT, checkpoint=last)
    table = table_of(rows, subject.student.vocabulary)
    score_V = _scored(run, score, table)
    if joint is not None:
        other = table_of(occurrences(joint, half=SELECT, checkpoint=ends(joint, None, after)[1]), len(table.count_V))
        score_V = score_V.minimum(_scored(joint, score, other))
    special = sorted({*subject.student.tokenizer.all_special_ids, *subject.student.stop_ids})
    allowed_V = score_V.masked_fill(score_V.isnan() | one_of([*special, *protect], len(score_V)), -torch.inf)
    limits = {"min_count": min_count, "exclude_most_frequent": exclude_most_frequent}
    ranked = top(allowed_V, table, len(score_V), **limits)
    ids = ranked[:k] if k is not None else ranked[: covering(table, ranked, coverage)]
    if not len(ids) or len(ids) == len(ranked):
        raise ValueError(
            f"{len(ids)} of the {len(ranked)} types that may be chosen would be rocks, which leaves no comparison; "
            "choose another --k, --coverage or --min-count"
        )
    groups = compared(table, ids, special, high_kl=len(ids) if high_kl is None else high_kl, random=random, seed=seed)
    others = torch.tensor([i for i in ranked.tolist() if i not in set(ids.tolist())])
    if len(others) < len(ids):
        raise ValueError(
            f"{len(ids)} rocks leave {len(others)} types for the control; choose a smaller --k or --coverage"
        )
    control = others[matched_control(table.count_V[ids], table.count_V[others])]
    types = _types(subject, rows, table, score_V, groups, control, special)
    settings = f"--score {score} " + (f"--k {k}" if k is not None else f"--coverage {coverage:g}")
    origin = f"run {run.name}, step {last}, {settings}, {len(rows)} tokens of the selecting half"
    held = shares(table, ids)
    shown = types[types["group"] == "rock"].nlargest(SHOWN, "score")
    shown = shown[["id", "text", "count", "kl_mean_nats", "kl_share", "token_share", "enrichment"]]
    return Outcome(
        f"Which token types carry the KL that is left after step {last} of {run.name}?",
        _said(held, shares(table, control), len(ids), table)
        + f" To freeze them: opd-lab run --config-dir {run.absolute()}/analysis/rock method=rock_selected",
        shown,
        {"token_table": types},
        {"select": figures.scores(types)},
        {
            "method/rock_selected.yaml": method_yaml(subject, ids, f"Rock tokens of {origin}."),
            "method/rock_control.yaml": method_yaml(subject, control, f"Types as frequent as the rocks of {origin}."),
        },
    )


def table_of(rows: Frame, types: int) -> TypeTable:
    """Occurrences per type, and the reverse KL at them."""
    return tabulate(torch.tensor(rows["token_id"].to_numpy()), torch.tensor(rows["kl_reverse"].to_numpy()), types)


def covering(table: TypeTable, ranked: Tensor, coverage: float) -> int:
    """How many of the first types hold this share of the corpus' KL."""
    held_K = table.kl_sum_V[ranked].cumsum(0) / table.kl_sum_V.sum()
    return int((held_K < coverage - 1e-12).sum()) + 1


def compared(
    table: TypeTable, rocks: Tensor, special: list[int], *, high_kl: int, random: int, seed: int
) -> dict[str, Tensor]:
    """The rocks; the types of highest mean KL among the others that occur twice (D); random ones of what is left."""
    taken_V = one_of([*rocks.tolist(), *special], len(table.count_V))
    high = top(table.mean_V.masked_fill(taken_V, -torch.inf), table, high_kl, min_count=2)
    taken_V |= one_of(high.tolist(), len(taken_V))
    left = ((table.count_V >= 2) & ~taken_V).nonzero().flatten()
    order = torch.randperm(len(left), generator=torch.Generator().manual_seed(seed))
    return {"rock": rocks, "high_kl": high, "random": left[order[:random]]}


def one_of(ids: list[int], types: int) -> Tensor:
    """True at these ids."""
    return torch.isin(torch.arange(types), torch.tensor(ids, dtype=torch.long))


def grouped(run: Path) -> dict[str, list[int]]:
    """The types that `select` chose, by group, and the control."""
    found = stored(run, "rock", "token_table", "rock select")
    groups = {name: found.loc[found["group"] == name, "id"].tolist() for name in ("rock", "high_kl", "random")}
    return groups | {"control": found.loc[found["control"], "id"].tolist()}


def method_yaml(subject: Subject, ids: Tensor, about: str) -> str:
    """A variant of `method=rock_tokens` that freezes these types."""
    texts = " ".join(json.dumps(subject.decode([i]), ensure_ascii=False) for i in ids.tolist())
    return (
        f"# {about}\n# Differs from rock_tokens.yaml in: token_ids, tokenizer_digest.\n"
        f"defaults: [rock_tokens, _self_]\ntoken_ids: {ids.tolist()} # {texts}\n"
        f'tokenizer_digest: "{tokenizer_digest(subject.student)}" # digest of the tokenizer that the ids belong to\n'
    )


def _scored(run: Path, score: str, table: TypeTable) -> Tensor:
    """The score of every type, NaN or -inf where it has none."""
    if score in COMPUTED:
        return COMPUTED[score](table).clone()
    stem, column, command = FROM_TABLES[score]
    found = stored(run, "rock", stem, command)
    score_V = torch.full_like(table.count_V, -torch.inf)
    score_V[torch.tensor(found["id"].to_numpy())] = torch.tensor(found[column].to_numpy(), dtype=torch.float64)
    return score_V


def _types(
    subject: Subject,
    rows: Frame,
    table: TypeTable,
    score_V: Tensor,
    groups: dict[str, Tensor],
    control: Tensor,
    special: list[int],
) -> Frame:
    seen = (table.count_V > 0).nonzero().flatten()
    shrunk, spread_V = empirical_bayes(table), (table.within_V / (table.count_V - 1)).sqrt()
    group = {i: name for name, ids in groups.items() for i in ids.tolist()}
    means = rows.groupby("token_id")[["entropy_student", "entropy_teacher"]].mean().loc[seen.tolist()]
    columns: dict[str, Any] = {
        "id": seen.tolist(),
        "text": [subject.decode([i]) for i in seen.tolist()],
        "count": table.count_V[seen].long().tolist(),
    }
    for name, value_V in (
        ("kl_sum_nats", table.kl_sum_V),
        ("kl_mean_nats", table.mean_V),
        ("kl_sd_nats", spread_V),
        ("lower_bound_nats", lower_bound(table)),
        ("shrunk_mean_nats", shrunk.mean_V),
        ("shrunk_lower_nats", shrunk.lower_V),
        ("score", score_V),
        ("kl_share", table.kl_sum_V / table.kl_sum_V.sum()),
        ("token_share", table.count_V / table.count_V.sum()),
        ("enrichment", table.mean_V / (table.kl_sum_V.sum() / table.count_V.sum())),
    ):
        columns[name] = value_V[seen].nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=torch.nan).tolist()
    columns |= {
        "entropy_student": means["entropy_student"].to_numpy(),
        "entropy_teacher": means["entropy_teacher"].to_numpy(),
        "group": [group.get(i, "") for i in seen.tolist()],
        "control": [i in set(control.tolist()) for i in seen.tolist()],
        "special": [i in special for i in seen.tolist()],
    }
    return frame(columns)


def _said(rocks: Shares, control: Shares, k: int, table: TypeTable) -> str:
    observed = int((table.count_V > 0).sum())
    said = (
        f"{k} of {observed} observed types ({k / len(table.count_V):.1%} of the vocabulary) hold {rocks.kl:.1%} of the "
        f"KL and {rocks.tokens:.1%} of the tokens: enrichment {rocks.enrichment:.2f}. The control holds "
        f"{control.kl:.1%} and {control.tokens:.1%}."
    )
    apart = abs(control.tokens / rocks.tokens - 1)
    return said + (
        f" Warning: the control covers {apart:.0%} {'fewer' if control.tokens < rocks.tokens else 'more'} tokens than "
        "the rocks, so it is no matched arm; method.mask=random_positions freezes as many."
        if apart > MATCHED
        else ""
    )
