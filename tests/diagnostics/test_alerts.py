"""Alarms: each provoked, by made reports and by runs of the lab that go wrong; none by one that goes well."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from opd_lab import config
from opd_lab.diagnostics import alerts
from opd_lab.diagnostics.alerts import Alarm, AlarmError, Alarms
from opd_lab.optimize import DivergedError
from opd_lab.settings import AlarmSettings
from opd_lab.tracking import read
from opd_lab.types import Report
from tests.lab_run import killed_after, run, settings

SETTINGS = AlarmSettings(
    first_steps=2,
    patience=2,
    gradient_ratio=10.0,
    inflation_ratio=2.0,
    collapse_ratio=0.5,
    repetition_fraction=0.5,
    outside_fraction=0.2,
    entropy_ratio=0.1,
    zero_weight_fraction=1.0,
    trap_fraction=0.1,
    below_start_fraction=0.05,
    drop_fraction=0.05,
    drop_errors=3.0,
)
HEALTHY = {
    "optim/gradient_norm": 1.0,
    "rollout/length_mean_tokens": 20.0,
    "rollout/repetition_fraction": 0.1,
    "overlap/outside_top16_fraction": 0.02,
    "entropy/student_mean_nats": 0.5,
    "entropy/teacher_mean_nats": 0.2,
    "weight/zero_fraction": 0.3,
}
AT_FIRST = {
    "eval/validation/avg_at_4": 0.3,
    "eval/validation/reverse_kl_mean_nats": 0.6,
    "eval/validation/length_mean_tokens": 20.0,
}


def alarms() -> Alarms:
    return Alarms(SETTINGS, "eval/validation/avg_at_4", clip_norm=0.5)


def feed(watching: Alarms, *steps: dict[str, float], begin: int = 0) -> list[Alarm]:
    return [alarm for i, scalars in enumerate(steps) for alarm in watching.check(Report(begin + i, scalars))]


@pytest.mark.parametrize(
    ("alarm", "changed", "threshold"),
    [
        ("gradient_explodes", {"optim/gradient_norm": 10.5}, 10.0),
        ("length_inflation", {"rollout/length_mean_tokens": 41.0}, 40.0),
        ("length_collapse", {"rollout/length_mean_tokens": 9.0}, 10.0),
        ("repetition", {"rollout/repetition_fraction": 0.5}, 0.5),
        ("entropy_collapse", {"entropy/student_mean_nats": 0.019}, 0.02),  # a tenth of the teacher's, which is lower
        ("zero_weight", {"weight/zero_fraction": 1.0}, 1.0),
    ],
)
def test_an_alarm_of_the_steps_begins_after_two_in_a_row_and_once(
    alarm: str, changed: dict[str, float], threshold: float
) -> None:
    watching, bad = alarms(), HEALTHY | changed
    assert feed(watching, HEALTHY, HEALTHY, HEALTHY, bad, HEALTHY) == []  # one of them is none
    (raised,) = feed(watching, bad, bad, bad, bad, begin=5)
    assert (raised.step, raised.alarm) == (6, alarm)
    assert raised.value == next(iter(changed.values()))
    assert raised.threshold == pytest.approx(threshold)
    assert feed(watching, HEALTHY, bad, bad) == []  # it has not ended: that takes two healthy steps
    (again,) = feed(watching, HEALTHY, HEALTHY, bad, bad, begin=12)
    assert (again.step, again.alarm) == (15, alarm)


@pytest.mark.parametrize(
    ("alarm", "later", "value", "threshold"),
    [
        ("length_inflation", {"eval/validation/length_mean_tokens": 41.0}, 41.0, 40.0),
        ("length_collapse", {"eval/validation/length_mean_tokens": 9.9}, 9.9, 10.0),
        ("mass_outside_top16", {"overlap/outside_top16_fraction": 0.25}, 0.25, 0.2),
        ("below_start", {"eval/validation/avg_at_4": 0.24, "eval/validation/reverse_kl_mean_nats": 0.7}, 0.24, 0.25),
    ],
)
def test_an_alarm_of_an_evaluation_or_of_the_tables_begins_at_once(
    alarm: str, later: dict[str, float], value: float, threshold: float
) -> None:
    watching = alarms()
    assert feed(watching, AT_FIRST, AT_FIRST) == []
    (raised,) = feed(watching, AT_FIRST | later, AT_FIRST | later, begin=20)
    assert (raised.step, raised.alarm, raised.value) == (20, alarm, value)
    assert raised.threshold == pytest.approx(threshold)


def test_the_agreement_trap_is_an_accuracy_that_falls_while_the_kl_does_not_rise() -> None:
    def evaluation(accuracy: float, kl: float) -> dict[str, float]:
        return {"eval/validation/avg_at_4": accuracy, "eval/validation/reverse_kl_mean_nats": kl}

    watching = alarms()
    assert feed(watching, evaluation(0.3, 0.6), evaluation(0.7, 0.3), evaluation(0.61, 0.2)) == []  # 0.09 is too little
    assert feed(watching, evaluation(0.5, 0.31)) == []  # it disagrees, too
    (raised,) = feed(watching, evaluation(0.5, 0.2), begin=9)
    assert (raised.alarm, raised.value, raised.step) == ("agreement_trap", 0.5, 9)
    assert raised.threshold == pytest.approx(0.6)
    assert "0.2 nats (0.3 at the best)" in raised.message


def test_a_healthy_run_raises_none_and_what_is_not_logged_is_not_judged() -> None:
    better = {"eval/validation/avg_at_4": 0.8, "eval/validation/reverse_kl_mean_nats": 0.1}
    surer = HEALTHY | {"entropy/student_mean_nats": 0.21, "optim/gradient_norm": 0.1}
    assert feed(alarms(), AT_FIRST, *[HEALTHY] * 5, AT_FIRST | better, *[surer] * 5) == []
    assert feed(alarms(), *[{"rollout/reward_mean_fraction": 0.1}] * 5) == []
    cut = HEALTHY | {"rollout/length_mean_tokens": 5.0, "rollout/cut_fraction": 0.9}
    assert feed(alarms(), *[HEALTHY] * 3, *[cut] * 4) == []  # a stop rule's work


def test_the_first_steps_are_the_measure_even_where_they_are_unlike() -> None:
    noisy = [HEALTHY | {"optim/gradient_norm": value} for value in (1.0, 3.0)]  # mean 2
    high = HEALTHY | {"optim/gradient_norm": 19.0}
    assert feed(alarms(), *noisy, high, high) == []
    assert len(feed(alarms(), *noisy, *[HEALTHY | {"optim/gradient_norm": 21.0}] * 2)) == 1
    small, larger, large = ({"optim/gradient_norm": value} for value in (0.001, 4.9, 5.1))
    assert feed(alarms(), *[small] * 3, *[larger] * 4) == []  # nothing explodes below ten times the clipping norm
    assert len(feed(alarms(), *[small] * 3, *[large] * 4)) == 1


def test_restored_from_a_checkpoint_it_goes_on_exactly() -> None:
    bad = HEALTHY | {"rollout/repetition_fraction": 0.9, "optim/gradient_norm": 99.0}
    steps = [AT_FIRST, HEALTHY, HEALTHY, bad, bad, HEALTHY, bad, HEALTHY, HEALTHY, bad, bad]
    whole = feed(alarms(), *steps)
    assert [alarm.step for alarm in whole] == [4, 4, 10, 10]
    for cut in range(len(steps)):
        first, second = alarms(), alarms()
        before = feed(first, *steps[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + feed(second, *steps[cut:], begin=cut) == whole


def evaluated(*correct: int, begin: int = 0) -> Report:
    """Four rollouts of each validation problem, all wrong on a test problem."""
    rows = [{"set": "validation", "problem": str(p), "n": 4, "correct": c} for p, c in enumerate(correct)]
    return Report(begin, tables={"evaluations": [*rows, {"set": "test", "problem": "0", "n": 4, "correct": 0}]})


def test_a_drop_that_recovers_is_an_alarm_where_it_is_more_than_chance() -> None:
    watching = alarms()

    def begun(*correct: int) -> list[str]:
        return [str(alarm) for alarm in watching.check(evaluated(*correct, begin=30))]

    assert begun(1, 1, 1, 1) == []
    assert begun(4, 4, 3, 1) == []  # the best: 0.75
    # Losses .5, .5, .25, 0: mean .3125, standard deviation .2394, three standard errors .359.
    assert begun(2, 2, 2, 1) == []
    # Losses .75, .75, .75, .25: mean .625, standard deviation .25, three standard errors .375.
    (said,) = begun(1, 1, 0, 0)
    assert said == (
        "alarm accuracy_drop at step 30: after 0.75 at its best, over 4 problems, standard error of the drop 0.12, "
        "validation accuracy 0.125, threshold 0.375"
    )
    assert begun(1, 1, 0, 0) == []  # on already
    assert begun(4, 4, 2, 1) == []  # recovered
    assert len(begun(1, 1, 0, 0)) == 1


def test_a_drop_below_the_fraction_is_none_however_sure() -> None:
    watching = alarms()
    assert watching.check(evaluated(*[4] * 200)) == []
    assert watching.check(evaluated(*[3] * 38, *[4] * 162)) == []  # .0475 of 200 problems, eight standard errors
    assert [alarm.alarm for alarm in watching.check(evaluated(*[3] * 41, *[4] * 159))] == ["accuracy_drop"]  # .05125


def test_chance_alone_rarely_drops_as_far() -> None:
    """A student that has ceased to learn, 20 evaluations of 64 problems: less than one run in twenty raises it."""
    draw, usual = random.Random(0), dataclasses.replace(SETTINGS, drop_errors=4.0)
    strengths = [draw.random() for _ in range(64)]
    raised = 0
    for _ in range(300):
        watching = Alarms(usual, "eval/validation/avg_at_4", clip_norm=0.5)
        seen = [evaluated(*(sum(draw.random() < s for _ in range(4)) for s in strengths)) for _ in range(20)]
        raised += any(watching.check(report) for report in seen)
    assert raised / 300 < 0.05


def test_a_checkpoint_from_before_an_alarm_resumes_without_its_memory() -> None:
    old = alarms()
    assert feed(old, AT_FIRST, HEALTHY, HEALTHY) == []
    state = {name: value for name, value in old.state_dict().items() if name != "peak"}
    young = alarms()
    young.load_state_dict(json.loads(json.dumps(state)))
    assert young.check(evaluated(1, 1, 0, 0)) == []  # it never saw a better one
    assert {k: v for k, v in young.state_dict().items() if k != "peak"} == state
    assert young.check(evaluated(4, 4, 3, 1)) == []
    assert [alarm.alarm for alarm in young.check(evaluated(1, 1, 0, 0))] == ["accuracy_drop"]


def test_a_drop_is_remembered_over_a_checkpoint() -> None:
    steps = [evaluated(*correct) for correct in ((1, 1, 1, 1), (4, 4, 3, 1), (1, 1, 0, 0), (4, 4, 2, 1), (1, 1, 0, 0))]
    for cut in range(len(steps)):
        first, second = alarms(), alarms()
        before = [alarm for report in steps[:cut] for alarm in first.check(report)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = [alarm for report in steps[cut:] for alarm in second.check(report)]
        assert [alarm.alarm for alarm in before + after] == ["accuracy_drop"] * 2


def test_a_run_from_before_an_alarm_keeps_its_name_and_goes_on_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config has no thresholds of the alarm, its checkpoint no memory of it."""
    now = settings(tmp_path)
    assert (now.diagnostics.alarms.drop_fraction, now.diagnostics.alarms.drop_errors) == (0.05, 4.0)  # conf's own
    values = dataclasses.asdict(now)
    for name in ("drop_fraction", "drop_errors"):
        del values["diagnostics"]["alarms"][name]
    old = config.settings_of(OmegaConf.create(values))
    assert old == now
    stricter = dataclasses.replace(now.diagnostics.alarms, drop_errors=2.0)
    changed = dataclasses.replace(now, diagnostics=dataclasses.replace(now.diagnostics, alarms=stricter))
    assert config.digest(old) == config.digest(now) != config.digest(changed)

    whole = run(tmp_path / "whole").folder
    with monkeypatch.context() as before, killed_after(2):
        before.setattr(alerts, "_STATE", [name for name in alerts._STATE if name != "peak"])
        run(tmp_path / "cut")
    cut = run(tmp_path / "cut").folder
    assert cut.name == whole.name
    assert (cut / "metrics.parquet").read_bytes() == (whole / "metrics.parquet").read_bytes()


LATER = ["steps=8", "evaluate.every=4", "checkpoint.every=0"]


def table(folder: Path) -> list[tuple[int, str]]:
    found = read.table(folder, "alarms")
    return list(zip(found["step"], found["alarm"])) if len(found) else []


def test_a_learning_rate_far_too_high_on_the_lab(tmp_path: Path) -> None:
    said: list[str] = []
    folder = run(tmp_path, *LATER, "optim.lr=0.1", say=said.append).folder
    raised = table(folder)
    assert {alarm for _, alarm in raised} >= {"length_inflation", "below_start", "repetition"}
    assert len([line for line in said if line.startswith("alarm ")]) == len(raised)
    assert f"alarm repetition at step {dict((a, s) for s, a in raised)['repetition']}: share of" in "\n".join(said)
    tags = read.status(folder)["tags"]
    assert {alarm for _, alarm in raised} == {name.removeprefix("alarm/") for name in tags if name.startswith("alarm/")}


@pytest.mark.slow
def test_a_teacher_worse_than_its_student_on_the_lab(tmp_path: Path) -> None:
    swapped = ["model.student.path=lab:teacher", "model.teacher.path=lab:student", "optim.lr=1e-3"]
    folder = run(tmp_path, *LATER, *swapped, "evaluate.problems=24").folder
    assert {alarm for _, alarm in table(folder)} == {"below_start", "agreement_trap", "accuracy_drop"}


def test_a_healthy_run_of_the_lab_raises_none(tmp_path: Path) -> None:
    said: list[str] = []
    folder = run(tmp_path, "steps=12", "evaluate.every=6", "evaluate.problems=16", say=said.append).folder
    assert table(folder) == [] and not [line for line in said if "alarm" in line]


def test_an_alarm_may_stop_the_run_with_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    bad = [*LATER, "steps=12", "optim.lr=0.1", "diagnostics.on_alarm=stop", "checkpoint.every=3"]
    with pytest.raises(
        AlarmError, match=r"alarm mass_outside_top16 at step 2: .*diagnostics\.on_alarm=stop, with a checkpoint"
    ):
        run(tmp_path, *bad)
    (folder,) = (path.parent for path in tmp_path.rglob("status.json"))
    assert read.status(folder)["status"] == "FAILED"
    assert {step for step, _ in table(folder)} == {2}
    assert (folder / "checkpoints" / "step_000002").is_dir()
    before = table(folder)
    said: list[str] = []
    with pytest.raises(AlarmError):  # the next one; those that are on already are not raised again
        run(tmp_path, *bad, say=said.append)
    assert any("resumed after step 2" in line for line in said)
    after = table(folder)
    assert after[: len(before)] == before and len(after) > len(before)
    assert len({alarm for _, alarm in after}) == len(after)


def test_a_gradient_that_is_no_number_is_an_alarm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: torch.tensor(torch.nan))
    said: list[str] = []
    with pytest.raises(DivergedError):
        run(tmp_path, say=said.append)
    (folder,) = (path.parent for path in tmp_path.rglob("status.json"))
    assert table(folder) == [(1, "gradient_not_finite")]
    assert any(line.startswith("alarm gradient_not_finite at step 1: step 0: the objective is") for line in said)
