"""What each pruner stops, worked out by hand. Four evaluations a trial, one trial after another; more is better."""

from itertools import pairwise

import optuna
import pytest
from bench import Bench, sweep_settings
from inline import Inline, one_process
from lab_sweep import asked
from optuna.trial import TrialState

from opd_lab.sweep.samplers import Halving


def stops(folder, patch, pruner: str, curves: dict[str, list[float]], **pruning) -> list[int]:
    """The step at which each trial ended."""
    rules = {"startup_trials": 1, "warmup_steps": 0, "reduction_factor": 2, "patience": 1, "p_threshold": 0.1}
    settings = sweep_settings(space={"curve": list(curves)}, pruner=pruner, pruning=rules | pruning)
    bench = Bench(folder, settings, launcher=Inline(), curves=curves)
    with one_process(bench.trials, patch):
        bench.run()
    ended = [(t.state, t.user_attrs["steps"]) for t in bench.study.trials()]
    assert all(state == (TrialState.COMPLETE if step == 4 else TrialState.PRUNED) for state, step in ended)
    return [step for _, step in ended]


def rising(*tops: float) -> dict[str, list[float]]:
    return {f"to {top}": [top * step / 4 for step in (1, 2, 3, 4)] for top in tops}


def test_median_stops_what_never_was_as_good_as_the_middle_one(tmp_path, monkeypatch):
    curves = rising(0.4, 0.8) | {"early": [0.16, 0.16, 0.5, 0.5], "late": [0.14, 0.9, 0.9, 0.9]}
    assert stops(tmp_path, monkeypatch, "median", curves) == [4, 4, 2, 1]


def test_patient_asks_median_once_a_trial_stops_getting_better(tmp_path, monkeypatch):
    curves = {
        "first": [0.5, 0.5, 0.5, 0.5],
        "worse and worse": [0.4, 0.3, 0.2, 0.1],
        "better again": [0.3, 0.2, 0.3, 0.3],
        "good once": [0.9, 0.1, 0.1, 0.1],
        "low but steady": [0.1, 0.1, 0.1, 0.1],
    }
    assert stops(tmp_path / "1", monkeypatch, "patient", curves) == [4, 2, 2, 4, 4]
    assert stops(tmp_path / "2", monkeypatch, "patient", curves, patience=2) == [4, 3, 4, 4, 4]


def test_successive_halving_lets_the_better_half_of_a_rung_go_on(tmp_path, monkeypatch):
    curves = rising(0.4, 0.8, 0.2, 0.6, 0.7)
    # of the first rung, step 1: .1 | .2 .1 | .2 .1 .05 (pruned) | .2 .15 .1 .05 | .2 .175 .15 .1 .05
    # of the second, step 2: .2 | .4 .2 | .4 .3 (pruned) .2 | .4 .35 .3 .2
    assert stops(tmp_path, monkeypatch, "successive_halving", curves) == [4, 4, 1, 2, 4]


def test_hyperband_holds_a_trial_against_its_own_bracket(tmp_path, monkeypatch):
    brackets = [1, 0, 2, 2, 1, 2, 1, 0, 0, 2]  # rungs: 1 and 2 in bracket 0, 2 in bracket 1, none before the end in 2
    half = Halving(every=1, factor=2, steps=4)
    assert [half.bracket("bench", number) for number in range(10)] == brackets
    curves = rising(*(1 - n / 10 for n in range(10)))  # each is worse than all before it
    assert stops(tmp_path, monkeypatch, "hyperband", curves) == [4, 4, 4, 4, 2, 4, 2, 1, 1, 4]


def test_wilcoxon_stops_what_is_worse_problem_by_problem(tmp_path, monkeypatch):
    curves = {"best": [0.8] * 4, "a little worse": [0.79] * 4, "as good": [0.8] * 4}
    # six problems, all of them worse: one chance in 2 ** 6 that this is luck
    assert stops(tmp_path, monkeypatch, "wilcoxon", curves, p_threshold=0.02) == [4, 1, 4]
    assert stops(tmp_path / "strict", monkeypatch, "wilcoxon", curves, p_threshold=0.0) == [4, 4, 4]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
@pytest.mark.parametrize(("every", "factor", "steps"), [(1, 2, 12), (2, 3, 50), (5, 4, 50), (1, 3, 30)])
def test_both_decide_what_optunas_own_decide(direction, every, factor, steps):
    theirs = (
        optuna.pruners.SuccessiveHalvingPruner(min_resource=every, reduction_factor=factor),
        optuna.pruners.HyperbandPruner(min_resource=every, max_resource=steps, reduction_factor=factor),
    )
    for ours, other in zip((Halving(every, factor), Halving(every, factor, steps)), theirs):
        told = []
        for pruner in (ours, other):
            sampler = optuna.samplers.RandomSampler(seed=0)
            study = optuna.create_study(study_name="s", sampler=sampler, pruner=pruner, direction=direction)
            study.optimize(lambda trial: climb(trial, every, steps), n_trials=60)
            told.append([(t.state, t.last_step) for t in study.trials])
        assert told[0] == told[1]
        assert len({state for state, _ in told[0]}) == 2


def climb(trial: optuna.Trial, every: int, steps: int) -> float:
    """Reports at every evaluation but the last, which decides nothing."""
    drawn = [trial.suggest_float(f"x{step}", 0, 1) for step in range(0, steps, every)]
    for step, (before, value) in zip(range(every, steps, every), pairwise([0.0, *drawn])):
        trial.report(before + value, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return drawn[-1]


def test_a_trial_with_one_evaluation_cannot_be_pruned(tmp_path):
    words = ["seed=0,1", "sweep.pruner=median", "steps=4", "evaluate.every=4"]
    with pytest.raises(ValueError, match=r"evaluate\.every < steps, got evaluate\.every=4 with steps=4"):
        asked(tmp_path, *words)
    seeds = ["optim.lr=1e-3,1e-4", *words[1:], "sweep.seeds=[0,1]"]  # the first run's end is in the middle of the trial
    assert asked(tmp_path, *seeds).settings.pruner == "median"
