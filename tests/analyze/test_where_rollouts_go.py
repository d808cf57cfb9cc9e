"""Questions about where rollouts go: recovery, continuation and phases, by hand and on short runs of the lab."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lab_run import run

from opd_lab import cli
from opd_lab.analyze.continuation import blended
from opd_lab.analyze.continuing import finished_well, interval
from opd_lab.analyze.phases import after_slip, means, phases_of, projections, share, trapped
from opd_lab.analyze.recovery import cut_at, quarters
from opd_lab.analyze.subject import Subject, open_run
from opd_lab.data.arithmetic import TEACHER_STYLE, Style, first_slip, problems, solution
from opd_lab.methods.base import Continued
from opd_lab.methods.kat_scan import scan
from opd_lab.types import REVERSE_KL, Behavior

F64 = torch.float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("text"), "evaluate.max_tokens=32", "optim.lr=1e-3").folder


@pytest.fixture(scope="module")
def subject(folder) -> Subject:
    return open_run(folder)


def table(folder: Path, name: str, stem: str) -> pd.DataFrame:
    return pd.read_parquet(folder / "analysis" / name / f"{stem}.parquet")


def ask(capsys, *words: object) -> str:
    assert cli.main(["analyze", *map(str, words)]) == 0
    printed = capsys.readouterr().out
    assert "?" in printed.splitlines()[0] + printed.splitlines()[1]
    assert max(map(len, printed.splitlines()[:-1])) <= 120
    return printed


# recovery


def test_a_cut_moves_back_to_the_end_of_a_step_or_forward_to_the_first():
    texts = ["", "a", "a ,", "a , bb", "a , bb ,", "a , bb , c"]
    assert [cut_at(texts, fraction, ",") for fraction in (0.0, 0.35, 0.5, 0.85, 1.0)] == [2, 2, 2, 4, 4]
    assert cut_at(["", "x", "xy", "xyz"], 0.7, ",") == 2  # no step ends anywhere: unmoved
    assert cut_at(["", "x", "x ,"], 1.0, ",") == 2  # the last token ends nothing that goes on


def test_quarters_are_of_equal_size_and_in_order():
    assert quarters(np.array([5.0, 1, 4, 2, 8, 7, 3, 6])).tolist() == [3, 1, 2, 1, 4, 4, 2, 3]
    assert sorted(quarters(np.arange(10.0))) == [1, 1, 1, 2, 2, 3, 3, 3, 4, 4]


def test_intervals_draw_problems_and_not_rollouts():
    """Two problems, one always right and one always wrong: two draws give 0, 1/2 or 1, with 1/4, 1/2, 1/4."""
    assert interval([7, 7, 9, 9], [1, 1, 0, 0], [1, 1, 1, 1]) == (0, 1)
    assert interval([0, 1, 2], [2, 2, 2], [4, 4, 4]) == (0.5, 0.5)


class Echo:
    """A writer that always ends with one text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def continue_(self, rollouts, cuts_B, *, samples, **how) -> list[Continued]:
        return [Continued([self.text] * samples, samples) for _ in range(len(rollouts))]


def test_continuations_are_graded_with_the_beginning_that_they_go_on_from(subject):
    """Cut before its last word, a correct answer is right with that word only; an ended one counts as it is."""
    subject.at("0")
    examples = subject.held_out("test", 48)
    rollouts = subject.sample(examples, 1, Behavior(), seed=1)
    right = (rollouts.reward_B == 1).nonzero().flatten()
    one = rollouts.rows(right[:1])
    answer = examples[int(one.group_B)].answer
    how = {"samples": 3, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    before = one.length_B - 2  # of the answer and the stop token
    assert finished_well(subject, Echo(answer), one, before, examples, **how) == [3]
    assert finished_well(subject, Echo("x"), one, before, examples, **how) == [0]
    assert finished_well(subject, Echo("x"), one, one.length_B, examples, **how) == [3]
    ended = finished_well(subject, Echo("x"), rollouts, rollouts.length_B, examples, **how)
    assert ended == [3 * int(reward) for reward in rollouts.reward_B.tolist()]


def test_recovery_of_a_run(folder, capsys):
    words = ["--problems", 24, "--rollouts", 2, "--fractions", 0.3, 0.9, "--temperature", 1]
    said = ask(capsys, "recovery", folder, *words)
    assert "of 48 responses are wrong and finished" in said
    found, responses = table(folder, "recovery", "recovery"), table(folder, "recovery", "responses")
    assert len(found) == 2 * len(responses) and found["correct"].between(0, 4).all()
    assert responses.groupby("quarter")["perplexity"].mean().is_monotonic_increasing
    early, late = (found[found["fraction"] == f]["correct"].sum() for f in (0.3, 0.9))
    assert early > late  # the lab's teacher is nearly perfect, and the later the more is spoilt
    assert cli.main(["analyze", "recovery", str(folder), "--problems", "2", "--rollouts", "1"]) == 2
    assert "quarters need 20; raise --problems" in capsys.readouterr().err


# continuation


def test_a_blend_with_the_whole_budget_is_the_teacher_and_one_without_is_the_student(subject):
    subject.at("0")
    examples = subject.held_out("test", 12)
    for budget, writer in ((1e9, subject.parts.teacher.lm), (0.0, subject.student)):
        blend, _ = blended(subject, budget)
        found, wanted = (
            subject.sample(examples, 2, behavior, seed=5, writer=lm)
            for behavior, lm in ((blend, subject.student), (Behavior(), writer))
        )
        assert found.response_BT.tolist() == wanted.response_BT.tolist()


def test_continuation_of_a_run(folder, capsys):
    assert cli.main(["analyze", "continuation", str(folder)]) == 2
    assert "blends nothing at its first step; give --budget" in capsys.readouterr().err
    words = ["--problems", 12, "--lengths", 0, 8, 40, "--budget", 1.0]
    ask(capsys, "continuation", folder, *words)
    found = table(folder, "continuation", "continuation")
    assert len(found) == 12 * 2 * 2 * 2 * 3
    whole = found[found["t"] == 40]  # beyond the limit: every rollout has ended, whoever would go on
    assert whole["ended"].all() and set(whole["correct"]) <= {0, 2}
    sums = found.groupby(["goes_on", "t", "prefix"])["correct"].sum()
    assert sums["teacher", 0, "blend"] == sums["teacher", 0, "student"]  # the same prompt, the same draws
    assert sums["teacher", 8, "blend"] >= sums["student", 8, "blend"]


# phases


def test_g3_phases_and_their_means():
    """KAT's page: kept 3, triggered at 8; pre 0..2, agreement 3..8, post 9..17."""
    d_BT = torch.tensor([[1.0] * 4 + [0.01] * 5 + [2.0] + [0.01] * 7 + [1.0]], dtype=F64)
    trap = scan(d_BT, 0.3, window=4, consecutive=3, stride=1, exempt=0, exempt_rule="kept")
    phase = phases_of(trap, torch.tensor([18]), 18)
    places = {name: part_BT[0].nonzero().flatten().tolist() for name, part_BT in phase.items()}
    assert places == {"pre": [0, 1, 2], "agreement": [*range(3, 9)], "post": [*range(9, 18)], "uncut": []}
    found = means(0, phase, {"kl": d_BT}).set_index("phase")["kl"]
    assert found[["pre", "agreement", "post"]].tolist() == pytest.approx([1.0, 0.175, 0.341111111])


def test_the_threshold_is_the_quantile_of_the_minima():
    """G5 of KAT's page: minima .4, .1, .3, .2 and eta .3 give .31; three of four then lie below it."""
    d_BT = torch.tensor([[m] * 3 for m in (0.4, 0.1, 0.3, 0.2)], dtype=F64)
    trap, anywhere, low_B, s = trapped(d_BT, None, window=2, consecutive=1, exempt_tokens=1, eta=0.3)
    assert s == pytest.approx(0.31) and low_B.tolist() == [0.4, 0.1, 0.3, 0.2]
    assert trap.onset_B.tolist() == [-1, 1, 1, 1] and anywhere.onset_B.tolist() == [-1, 0, 0, 0]
    assert trapped(d_BT, 0.15, window=2, consecutive=1, exempt_tokens=0, eta=0.3)[0].onset_B.tolist() == [-1, 0, -1, -1]
    with pytest.raises(ValueError, match="no rollout has the 4 tokens of a window"):
        trapped(d_BT, None, window=4, consecutive=1, exempt_tokens=0, eta=0.3)


def test_the_share_of_a_gradient_in_some_directions():
    g_W, u_WK = torch.tensor([[3.0, 0], [0, 4], [0, 0]], dtype=F64), torch.eye(3, dtype=F64)[:, :1]
    assert share(g_W, u_WK) == (pytest.approx(9 / 25), pytest.approx(1 / 3))
    assert share(g_W, torch.eye(3, dtype=F64)) == (1, 1)


def test_gradients_of_phases_add_up_to_that_of_all_tokens(subject):
    """With one phase only and all directions, rho is 1 everywhere; a phase without tokens has none."""
    subject.at("final")
    rollouts = subject.sample(subject.held_out("test", 6), 1, Behavior(), seed=0)
    phase = {name: torch.zeros_like(rollouts.mask_BT) for name in ("agreement", "post", "uncut")}
    weights = {n: p for n, p in subject.student.module.named_parameters() if "q_proj" in n}
    every = {name: torch.eye(len(p), dtype=F64) for name, p in weights.items()}
    rows = projections(subject, rollouts, {"pre": rollouts.mask_BT, **phase}, every)
    assert len(rows) == len(every) == 2
    assert {(row["phase"], row["kind"]) for row in rows} == {("pre", "attention")}
    assert [row["rho"] for row in rows] == pytest.approx([1, 1])
    assert all(p.grad is None for p in subject.student.module.parameters())


def test_first_slip_of_worked_solutions():
    problem = SimpleNamespace(prompt="start 47 + 8 * 3 ?", answer="65")
    right = "so 47 plus 8 makes 55 , now 55 times 3 makes 65 , answer 65"
    assert first_slip(problem.prompt, right) is None
    assert first_slip(problem.prompt, right.replace("55", "54")) == 5
    assert first_slip(problem.prompt, right.replace("answer 65", "answer 64")) == 15
    assert first_slip(problem.prompt, right + " 65") == 16
    assert first_slip(problem.prompt, "so 47 plus 8") is None  # unfinished, not wrong
    generator = torch.Generator().manual_seed(0)
    for one in problems("test", (2, 3), 20, 0):
        assert first_slip(one.prompt, solution(one, TEACHER_STYLE, generator)) is None
        sloppy = solution(one, Style(TEACHER_STYLE.connectives, slip=1.0), generator)
        assert first_slip(one.prompt, sloppy) in (None, 5, 12, 19)


def test_cuts_after_a_slip_and_what_chance_gives():
    """Two cuts at 4 and 6 tokens; the first is after its slip. Of the three rollouts longer than 4 tokens, one has
    slipped before 4; of the two longer than 6, one before 6."""
    rows = pd.DataFrame({"slip": [3, 8, 5], "kept": [4, 6, 9], "end": [7, 9, -1], "generated": [6, 9, 9]})
    after, chance = after_slip(rows)
    assert after == 0.5
    assert chance == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_phases_of_a_run(folder, capsys):
    said = ask(capsys, "phases", folder, "--problems", 40, "--checkpoints", 0, 4)
    assert "of the cuts fall after a slip" in said
    found, rollouts = table(folder, "phases", "phases"), table(folder, "phases", "rollouts")
    for step in (0, 4):
        mine = found[found["checkpoint"] == step]
        kl = np.concatenate(rollouts.loc[rollouts["checkpoint"] == step, "kl"].to_list())
        assert mine["share"].sum() == pytest.approx(1) and mine["tokens"].sum() == len(kl)
        assert (mine["tokens"] * mine["kl_mean_nats"].fillna(0)).sum() == pytest.approx(kl.sum())
    pairs = found.pivot_table(index="checkpoint", columns="phase", values="kl_mean_nats")
    assert (pairs["agreement"] < pairs["uncut"]).all()
    wanted = table(folder, "phases", "teacher_tokens")
    assert wanted[wanted["phase"] != "post"].groupby(["checkpoint", "phase"])["probability"].sum().between(0, 1).all()
    assert table(folder, "phases", "projection")["rho"].between(0, 1).all()
    for name in ("phases", "projection"):
        assert (folder / f"analysis/phases/{name}.png").stat().st_size > 10_000


def test_measured_signals_do_not_depend_on_the_micro_batch(subject):
    from dataclasses import replace

    subject.at("0")
    rollouts = subject.sample(subject.held_out("test", 7), 1, Behavior(), seed=2)
    kl_BT = subject.measured(rollouts, frozenset({REVERSE_KL}))[REVERSE_KL]
    small = replace(subject, settings=replace(subject.settings, optim=replace(subject.settings.optim, micro_batch=2)))
    other_BT = small.measured(rollouts, frozenset({REVERSE_KL}))[REVERSE_KL]
    torch.testing.assert_close(other_BT, kl_BT, atol=1e-5, rtol=1e-5, equal_nan=True)


# what is found reaches the run's store


def test_an_analysis_is_logged_to_the_runs_store_and_survives_a_rebuild(tmp_path, capsys, caplog):
    from opd_lab.results import deliver, rebuild
    from opd_lab.tracking.mlflow import IDENTITY, open_store

    made = run(tmp_path, "steps=1", "evaluate.max_tokens=32", mlflow=True).folder
    known = json.loads((made / IDENTITY).read_text())
    client = open_store(known["uri"], tmp_path, "opd_lab").client
    before = client.get_run(known["run_id"]).info
    ask(capsys, "continuation", made, "--problems", 4, "--lengths", 4, "--budget", 1.0)
    names = {"continuation.parquet", "continuation.png", "continuation.txt"}

    def logged(client, run_id):
        return {path.path.split("/")[-1] for path in client.list_artifacts(run_id, "analysis/continuation")}

    assert logged(client, known["run_id"]) == names
    after = client.get_run(known["run_id"]).info
    assert (after.status, after.end_time) == (before.status, before.end_time)  # asking changes nothing of the run

    uri = f"sqlite:///{tmp_path / 'other.db'}"
    rebuild(made, uri)
    again = open_store(uri, tmp_path, "opd_lab").client
    (found,) = again.search_runs([again.get_experiment_by_name("opd_lab").experiment_id])
    assert logged(again, found.info.run_id) == names

    # a store that is away gets it later
    (made / IDENTITY).write_text(json.dumps(known | {"uri": "sqlite:////proc/nothing/mlflow.db"}))
    ask(capsys, "phases", made, "--problems", 8)
    assert "is away" in caplog.text
    (made / IDENTITY).write_text(json.dumps(known))
    assert deliver(made) == "delivered"
    paths = {path.path for path in client.list_artifacts(known["run_id"], "analysis/phases")}
    assert "analysis/phases/phases.parquet" in paths
