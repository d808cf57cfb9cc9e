"""`opd-lab analyze phases RUN`: what happens before, in and after a stretch on which student and teacher agree?

(KAT, arXiv 2606.09471.) Rollouts of the student at several checkpoints, whole, scanned afterwards as KAT would: pre =
the tokens before the cut, agreement = from there to the end of the unbroken run of low windows, post = the rest;
`uncut` are all tokens of rollouts without a trap. The threshold is a quantile of these rollouts' own minima, so some
are cut whether or not there is a trap: the judges are the slips (embedded lab) and the gradients.

phases.parquet          a row per checkpoint and phase: tokens, share, kl_mean_nats, entropy_student, entropy_teacher
                        (nats), teacher_top (mean probability of the teacher's likeliest token)
rollouts.parquet        a row per rollout: checkpoint, rollout, group, reward, generated, kept, end, onset (if no token
                        were exempt; -1 = none), lowest_nats, slip (place of the first wrong token; -1 = none, the lab
                        only), kl (nats, a list over tokens)
teacher_tokens.parquet  a row per checkpoint, phase and rank: id, text, probability (mean, of the teacher)
projection.parquet      a row per checkpoint, phase and weight matrix: matrix, kind (attention | mlp | other), rho,
                        chance

rho = ||U U^T g||^2 / ||g||^2: the share of a phase's gradient g (of its summed reverse KL) in the `rank` strongest left
directions U of the change of the matrix over the run. `chance` is what a gradient without direction has: rank / rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from opd_lab.analyze.figures import panels
from opd_lab.analyze.outcome import Frame, Outcome, frame, stacked
from opd_lab.analyze.subject import Subject, open_run
from opd_lab.chunk import Chunk
from opd_lab.data.arithmetic import first_slip
from opd_lab.data.prompts import Example
from opd_lab.methods.base import quantile
from opd_lab.methods.kat import KAT
from opd_lab.methods.kat_scan import Trap, lowest, scan, split
from opd_lab.models import evaluating
from opd_lab.types import ENTROPY_STUDENT, ENTROPY_TEACHER, FULL_TEACHER, REVERSE_KL, Behavior, Rollouts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAB = {"window": 6, "consecutive": 2, "exempt_tokens": 4, "eta": 0.3}  # as method=kat_lab
HEADS = {
    "kl_mean_nats": "KL",
    "entropy_student": "H student",
    "entropy_teacher": "H teacher",
    "teacher_top": "teacher top",
}
PHASES = {"pre": "tab:blue", "agreement": "tab:orange", "post": "tab:green", "uncut": "grey"}  # and their colours
NEVER = 2**31 - 1  # the place of a slip in a rollout without one


def answer(
    run: Path,
    *,
    checkpoints: list[str],
    problems: int,
    data_split: str,
    window: int | None,
    consecutive: int | None,
    exempt: int | None,
    eta: float | None,
    threshold: float | None,
    rank: int,
    top: int,
    seed: int,
) -> Outcome:
    subject = open_run(run)
    given = {"window": window, "consecutive": consecutive, "exempt_tokens": exempt, "eta": eta}
    method = subject.parts.method
    own = {name: getattr(method, name) for name in LAB} if isinstance(method, KAT) else LAB
    rule = {name: own[name] if given[name] is None else given[name] for name in LAB}
    directions = changed(subject, rank)
    examples = subject.held_out(data_split, problems)
    tables: dict[str, list[Frame]] = {name: [] for name in ("phases", "rollouts", "teacher_tokens", "projection")}
    said = []
    for which in checkpoints:
        step = subject.at(which)
        rollouts = subject.sample(examples, 1, Behavior(), seed=seed)
        seen = subject.measured(rollouts, frozenset({REVERSE_KL, ENTROPY_STUDENT, ENTROPY_TEACHER}))
        d_BT = seen[REVERSE_KL].clamp(min=0)
        trap, anywhere, low_B, s = trapped(d_BT, threshold, **rule)
        phase = phases_of(trap, rollouts.length_B.cpu(), d_BT.shape[1])
        rows = _rollouts(subject, rollouts, examples, d_BT, trap, anywhere, low_B)
        teacher = teacher_says(subject, rollouts, phase)
        columns = {"kl_mean_nats": d_BT, "entropy_student": seen[ENTROPY_STUDENT]}
        columns |= {"entropy_teacher": seen[ENTROPY_TEACHER], "teacher_top": teacher.likeliest_BT}
        tables["phases"].append(means(step, phase, columns))
        tables["rollouts"].append(rows.assign(checkpoint=step))
        tables["teacher_tokens"].append(_wanted(subject, step, teacher, top))
        tables["projection"].append(frame(projections(subject, rollouts, phase, directions)).assign(checkpoint=step))
        said.append(_said(step, rows, s))
    found = {name: stacked(parts) for name, parts in tables.items()}
    mean_rho = found["projection"].groupby(["checkpoint", "phase"])[["rho", "chance"]].mean().reset_index()
    shown = found["phases"].merge(mean_rho, on=["checkpoint", "phase"], how="left")
    shown = shown.rename(columns=HEADS)
    return Outcome(
        f"What do student and teacher do before, in and after a stretch of low divergence, in {run.name}?",
        " ".join(said) + f" rho: share of a phase's gradient in the {rank} strongest directions of the run's weights.",
        shown,
        found,
        {"phases": _maps(found["rollouts"]), "projection": _bars(found["projection"])},
    )


def trapped(
    d_BT: Tensor, threshold: float | None, *, window: int, consecutive: int, exempt_tokens: int, eta: float
) -> tuple[Trap, Trap, Tensor, float]:
    """Where KAT would cut, where it would without an exempt zone, each rollout's minimum, and the threshold: that
    given, or the 1 - eta quantile of the minima."""
    none_B = torch.full((len(d_BT),), -1)
    low_B = lowest(d_BT, window, none_B)
    if bool(low_B.isnan().all()):
        raise ValueError(f"no rollout has the {window} tokens of a window; choose a smaller --window")
    s = float(quantile(low_B[~low_B.isnan()], 100 * (1 - eta))) if threshold is None else threshold
    how = {"window": window, "consecutive": consecutive, "stride": 1, "exempt_rule": "kept"}
    return scan(d_BT, s, exempt=exempt_tokens, **how), scan(d_BT, s, exempt=0, **how), low_B, s


def phases_of(trap: Trap, length_B: Tensor, columns: int) -> dict[str, Tensor]:
    """Which tokens are in which phase, shape BT."""
    none_B = trap.trigger_B < 0
    kept_B, end_B = (torch.where(none_B, length_B, at_B) for at_B in (trap.onset_B, trap.end_B))
    part, cut_B1 = split(kept_B, end_B, length_B, columns), ~none_B[:, None]
    cut = {name.removesuffix("_BT"): part_BT & cut_B1 for name, part_BT in part._asdict().items()}
    return cut | {"uncut": part.pre_BT & ~cut_B1}


def means(step: int, phase: dict[str, Tensor], columns: dict[str, Tensor]) -> Frame:
    total = sum(int(part_BT.sum()) for part_BT in phase.values())
    return frame(
        [
            {"checkpoint": step, "phase": name, "tokens": int(phase[name].sum())}
            | {"share": int(phase[name].sum()) / total}
            | {column: float(value_BT[phase[name]].mean()) for column, value_BT in columns.items()}
            for name in PHASES
        ]
    )


class TeacherSays:
    """Sums of the teacher's distribution per phase, and the probability of its likeliest token at each."""

    def __init__(self, phase: dict[str, Tensor], vocabulary: int) -> None:
        some_BT = phase["pre"]
        self.likeliest_BT = torch.full(some_BT.shape, torch.nan, dtype=torch.float64)
        self.sum_V = {name: torch.zeros(vocabulary, dtype=torch.float64) for name in phase}
        self.tokens = {name: int(part_BT.sum()) for name, part_BT in phase.items()}


@torch.no_grad()
def teacher_says(subject: Subject, rollouts: Rollouts, phase: dict[str, Tensor]) -> TeacherSays:
    out = TeacherSays(phase, subject.student.vocabulary)
    for row_R, part, student, teacher in subject.views(rollouts):
        where_N2 = part.mask_BT.nonzero()
        ids_N = part.response_BT[part.mask_BT]
        for rows in torch.arange(len(ids_N)).split(subject.settings.optim.chunk_tokens):
            q_NV = Chunk(ids_N[rows], student.at(rows), teacher.at(rows))[FULL_TEACHER].double().exp().cpu()
            at = row_R.cpu()[where_N2[rows, 0].cpu()], where_N2[rows, 1].cpu()
            out.likeliest_BT[at] = q_NV.amax(1)
            for name, part_BT in phase.items():
                out.sum_V[name] += q_NV[part_BT[at]].sum(0)
    return out


def _wanted(subject: Subject, step: int, teacher: TeacherSays, top: int) -> Frame:
    rows = []
    for name in PHASES:
        mean = (teacher.sum_V[name] / max(teacher.tokens[name], 1)).topk(min(top, subject.student.vocabulary))
        for rank, (p, i) in enumerate(zip(mean.values.tolist(), mean.indices.tolist()), 1):
            columns = {"checkpoint": step, "phase": name, "rank": rank, "id": i}
            rows.append(columns | {"text": subject.decode([i]), "probability": p})
    return frame(rows)


def changed(subject: Subject, rank: int) -> dict[str, Tensor]:
    """The strongest left directions of every trained weight matrix' change over the run, [rows, rank], without the
    embeddings and the head."""
    subject.at("final")
    ends = {name: value.detach().clone() for name, value in _matrices(subject).items()}
    subject.at("0")
    change = {name: (ends[name] - value.detach()).double() for name, value in _matrices(subject).items()}
    return {name: torch.linalg.svd(d_W, full_matrices=False).U[:, :rank] for name, d_W in change.items() if d_W.any()}


def _matrices(subject: Subject) -> dict[str, Tensor]:
    module: Any = subject.student.module
    ends = {id(module.get_input_embeddings().weight), id(module.get_output_embeddings().weight)}
    trained = ((name, value) for name, value in module.named_parameters() if value.requires_grad and value.ndim == 2)
    return {name: value for name, value in trained if id(value) not in ends}


def projections(
    subject: Subject, rollouts: Rollouts, phase: dict[str, Tensor], directions: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """rho of each phase that has tokens, per matrix."""
    student, size = subject.student, subject.settings.optim.micro_batch
    rows = []
    for name in PHASES:
        if not phase[name].any():
            continue
        student.module.zero_grad()
        with evaluating(student.module):
            for row_R in torch.arange(len(rollouts)).split(size):
                part = rollouts.rows(row_R)
                inside_N = phase[name][row_R].to(part.mask_BT.device)[part.mask_BT]
                ids_N, states = part.response_BT[part.mask_BT], student.states(part)
                teacher = subject.parts.teacher.view(part, frozenset({REVERSE_KL}))
                Chunk(ids_N, states, teacher)[REVERSE_KL][inside_N].sum().backward()
        for matrix, value in _matrices(subject).items():
            if value.grad is not None and matrix in directions:
                rho, chance = share(value.grad.double().cpu(), directions[matrix].cpu())
                kind = next((kind for kind, mark in (("attention", "attn"), ("mlp", "mlp")) if mark in matrix), "other")
                rows.append({"phase": name, "matrix": matrix, "kind": kind, "rho": rho, "chance": chance})
        student.module.zero_grad()
    return rows


def share(g_W: Tensor, u_WK: Tensor) -> tuple[float, float]:
    """The share of a matrix' squared norm in the span of some orthonormal columns, and that of a matrix without
    direction."""
    return float((u_WK.T @ g_W).square().sum() / g_W.square().sum()), u_WK.shape[1] / len(g_W)


def _rollouts(
    subject: Subject,
    rollouts: Rollouts,
    examples: list[Example],
    d_BT: Tensor,
    trap: Trap,
    anywhere: Trap,
    low_B: Tensor,
) -> Frame:
    length_B, lab = rollouts.length_B.tolist(), subject.settings.data.kind == "arithmetic"
    texts = subject.student.texts(rollouts) if lab else []
    slips = [first_slip(e.messages[-1]["content"], text) for e, text in zip(examples, texts)]
    cut_B = trap.trigger_B >= 0
    return frame(
        {
            "rollout": rollouts.uid_B.tolist(),
            "group": rollouts.group_B.tolist(),
            "reward": rollouts.reward_B.tolist(),
            "generated": length_B,
            "kept": torch.where(cut_B, trap.onset_B, rollouts.length_B.cpu()).tolist(),
            "end": trap.end_B.tolist(),
            "onset": anywhere.onset_B.tolist(),
            "lowest_nats": low_B.tolist(),
            "slip": [-1 if slip is None else slip for slip in slips] if lab else -1,
            "kl": [row[:n] for row, n in zip(d_BT.tolist(), length_B)],
        }
    )


def _said(step: int, rows: Frame, threshold: float) -> str:
    cut = rows[rows["end"] >= 0]
    onset = rows.loc[rows["onset"] >= 0, "onset"]
    said = (
        f"Step {step}: threshold {threshold:.4f} nats, {len(cut)} of {len(rows)} rollouts cut, {len(onset)} hold a low "
        f"stretch (median onset {onset.median():.0f})."
    )
    if not len(cut) or (rows["slip"] < 0).all():
        return said
    after, chance = after_slip(rows)
    return said + f" {after:.1%} of the cuts fall after a slip; cuts as long in any rollout: {chance:.1%}."


def after_slip(rows: Frame) -> tuple[float, float]:
    """The share of cuts that fall after the first wrong token; and of the same cuts in any rollout that is so long."""
    slip_B = rows["slip"].where(rows["slip"] >= 0, NEVER).to_numpy()
    kept_B, cut_B = rows["kept"].to_numpy(), (rows["end"] >= 0).to_numpy()
    long_CB = rows["generated"].to_numpy() > kept_B[cut_B, None]
    slipped_CB = (slip_B < kept_B[cut_B, None]) & long_CB
    return float((slip_B < kept_B)[cut_B].mean()), float(np.mean(slipped_CB.sum(1) / long_CB.sum(1)))


def _maps(rollouts: Frame) -> Figure:
    from matplotlib.colors import LogNorm

    steps = sorted(rollouts["checkpoint"].unique())
    figure, axes = panels(len(steps), "KL(student || teacher) of each token, nats; white: where KAT would cut")
    image: Any = None
    for panel, step in zip(axes, steps):
        rows = rollouts[rollouts["checkpoint"] == step].sort_values("generated")
        kl_BT = np.full((len(rows), rows["generated"].max()), np.nan)
        for b, kl in enumerate(rows["kl"]):
            kl_BT[b, : len(kl)] = kl
        image = panel.imshow(kl_BT, aspect="auto", norm=LogNorm(1e-4, 10, clip=True), interpolation="nearest")
        cut = (rows["end"] >= 0).to_numpy()
        panel.plot(rows["kept"][cut] - 0.5, np.arange(len(rows))[cut], ".", color="white", markersize=2)
        panel.set(title=f"step {step}", xlabel="response position, tokens", ylabel="rollouts by length")
    figure.colorbar(image, ax=axes, label="nats")
    return figure


def _bars(projection: Frame) -> Figure:
    steps = sorted(projection["checkpoint"].unique())
    figure, axes = panels(len(steps), "Share of a phase's gradient in the directions of the run (line: chance)")
    for panel, step in zip(axes, steps):
        rows = projection[projection["checkpoint"] == step]
        table = rows.pivot_table(index="kind", columns="phase", values="rho")
        table = table[[name for name in PHASES if name in table]]
        for place, name in enumerate(table.columns):
            panel.bar(np.arange(len(table)) + 0.2 * place, table[name], width=0.2, label=name, color=PHASES[name])
        panel.axhline(rows["chance"].mean(), color="black", linewidth=0.8)
        panel.set(title=f"step {step}", ylabel="rho", ylim=(0, 1))
        panel.set_xticks(np.arange(len(table)) + 0.3, table.index.tolist())
        panel.legend(fontsize=7)
    return figure
