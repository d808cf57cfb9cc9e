"""The papers' own figures that are curves over steps."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from dashboards.figures import lines
from dashboards.figures.accuracy import VALIDATION
from dashboards.runs import Selected
from dashboards.style import empty


@dataclass(frozen=True)
class Curves:
    """A figure of a paper that is curves over steps: which, and of what."""

    paper: str
    question: str
    metrics: dict[str, str]
    unit: str  # of all its metrics; empty: each panel names its own
    method: str  # whose runs must be among those compared


CURVES = {
    "trb_3": Curves(
        "TRB, arXiv 2605.31159, figure 3",
        "Do blended rollouts keep the teacher sure, and does accuracy gain by it?",
        {"entropy/teacher_mean_nats": "teacher's entropy, nats", "eval/validation/pass_at_1": "pass@1"},
        "",
        "trb",
    ),
    "tropd_3": Curves(
        "TrOPD, arXiv 2606.01249, figure 3",
        "Do trust regions keep the student's entropy up and the gradient small?",
        {"entropy/student_mean_nats": "student's entropy, nats", "optim/gradient_norm": "gradient norm"},
        "",
        "tropd",
    ),
    "tropd_outliers": Curves(
        "TrOPD, arXiv 2606.01249, its acceptance rule",
        "Are outliers as frequent as the total variation says?",
        {
            "tropd/outlier_fraction": "share of outliers",
            "tropd/total_variation_mean_fraction": "total variation",
        },
        "fraction",
        "tropd",
    ),
    "oprd_6": Curves(
        "OPRD, arXiv 2606.06021, figures 5 and 6",
        "Do the student's states turn towards the teacher's?",
        {
            "oprd/cosine_mean_fraction": "cosine of the states",
            "oprd/subspace_cosine_mean_fraction": "cosine in the bridge",
            "rollout/length_mean_tokens": "tokens per rollout",
        },
        "",
        "oprd",
    ),
    "omniopd_3": Curves(
        "OmniOPD, arXiv 2606.01476, figure 3",
        "Does the student stay near its beginning while the audit's loss falls?",
        {
            "omniopd/audit_loss_mean_nats": "audit loss, nats",
            "omniopd/reference_kl_mean_nats": "KL to the initial student, nats",
            "eval/validation/pass_at_1": "pass@1",
        },
        "",
        "omniopd",
    ),
    "fire": Curves(
        "FiRe-OPD, arXiv 2606.02684, its filter",
        "Are the rollouts that the filter keeps the better ones?",
        {
            "fire_opd/kept_reward_mean_fraction": "correct among kept",
            "fire_opd/dropped_reward_mean_fraction": "correct among dropped",
        },
        "fraction",
        "fire_opd",
    ),
    "scope_3": Curves(
        "SCOPE, arXiv 2604.10688, figure 3",
        "Does routing by correctness keep entropy while accuracy rises?",
        {"entropy/student_mean_nats": "student's entropy, nats", "eval/validation/pass_at_1": "pass@1"},
        "",
        "scope",
    ),
    "rock": Curves(
        "Rock Tokens, arXiv 2605.09253, the frozen types during training",
        "Do the frozen types stay hard while the others are learnt?",
        {
            "rock_tokens/frozen_kl_mean_nats": "KL of frozen types, nats",
            "rock_tokens/other_kl_mean_nats": "KL of the others, nats",
        },
        "",
        "rock_tokens",
    ),
    "kat": Curves(
        "KAT, arXiv 2606.09471, where rollouts end",
        "Is the KL lower after the cut, and how much of a rollout is kept?",
        {
            "kat/kl_pre_mean_nats": "KL before the cut, nats",
            "kat/kl_agreement_mean_nats": "KL in agreement, nats",
            "kat/kept_fraction": "share of tokens kept",
        },
        "",
        "kat",
    ),
}


def curve(selected: Selected, name: str) -> go.Figure:
    """One of CURVES; methods that do not log its metrics are absent."""
    said = CURVES[name]
    needs = f"It needs runs with method={said.method}, or a variant of it, and graded data."
    if not any(label.startswith(said.method) for label in selected.labels):
        return empty(said.question, needs)
    return lines.draw(
        selected,
        said.question,
        said.metrics,
        unit=said.unit,
        missing=needs,
        note=f"{said.paper}.",
        alike=bool(said.unit),
    )


def rock_arms(selected: Selected) -> go.Figure:
    """Rock Tokens, figure 5: validation accuracy of the arms, frozen types or positions beside plain OPD."""
    question = "What does it cost to freeze the rocks, and what to freeze as many others?"
    frozen = [label for label in selected.labels if label.startswith("rock_")]
    if not frozen:
        return empty(question, "It needs runs with method=rock_tokens, or a variant of it.")
    arms = selected.only([label for label in selected.labels if label.split()[0] == "opd" or label in frozen])
    names = {name: "" for name in arms.names() if VALIDATION.match(name)}
    return lines.draw(
        arms,
        question,
        names,
        unit="share of correct rollouts",
        missing="It needs graded data and evaluate.every > 0.",
        note="Rock Tokens, arXiv 2605.09253, figure 5; an arm: frozen types or positions. Validation problems.",
    )
