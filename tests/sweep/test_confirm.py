"""What a search found, run again: which trials, with which seeds, against what, and what is said of it."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from lab_run import command
from lab_sweep import asked
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from opd_lab import config
from opd_lab.sweep import confirm, owner, points, run, verdict
from opd_lab.sweep.contract import Mail
from opd_lab.sweep.question import Question
from tests.tracking.services import wait_for

SEARCH = ("optim.lr=interval(0,1)", "sweep.sampler=random", "sweep.trials=9", "sweep.name=search")


def searched(folder, *words, top: int = 1, trials) -> Question:
    """A study made by hand, and the question that confirms it. `trials`: (values or a state, params)."""
    began = asked(folder, *words)
    of = owner.home(folder) / began.name
    study = run._study(began, began.samples[0][1], of)
    kinds = {p.key: p.distribution for p in began.space.parameters}
    for ended, params in trials:
        done = not isinstance(ended, TrialState)
        values = ({"value": ended} if isinstance(ended, float) else {"values": ended}) if done else {}
        state = TrialState.COMPLETE if done else ended
        study.optuna.add_trial(
            create_trial(state=state, params=params, distributions={key: kinds[key] for key in params}, **values)
        )
    of.mkdir(parents=True, exist_ok=True)
    owner.write_card(of, study.card())
    return asked(folder, *words, f"sweep.confirm.top={top}")


FIVE = [
    (0.25, {"optim.lr": 0.125}),
    (TrialState.PRUNED, {"optim.lr": 0.75}),
    (0.75, {"optim.lr": 0.5}),
    (0.5, {"optim.lr": 0.0003}),  # the config's own
    (TrialState.FAIL, {"optim.lr": 1.0}),
]


def test_the_best_trial_beside_the_defaults_with_fresh_seeds(tmp_path):
    question = confirm.of(
        searched(tmp_path, *SEARCH, "sweep.pruner=median", "sweep.time_limit_seconds=10", trials=FIVE)
    )
    assert question.space.texts == {"points.defaults": "{}", "points.best (trial 2)": "{optim.lr=0.5}"}
    s = question.settings
    assert (question.name, s.seeds, s.sampler, s.pruner, s.trials) == ("search_confirm", [1, 2, 3], None, None, None)
    assert s.time_limit_seconds == 30.0  # of a trial: three runs in place of one
    runs = [order for point in question.space.points() for order in question.runs(point)]
    assert [(r.optim.lr, r.seed, r.tracking.experiment) for _, r in runs] == [
        (lr, seed, "search_confirm") for lr in (0.0003, 0.5) for seed in (1, 2, 3)
    ]


def test_the_defaults_are_not_run_twice_nor_any_setting_for_its_seeds(tmp_path):
    words = ("optim.lr=choice(0.0003,0.25,0.5)", "seed=4,7", "sweep.name=grid")
    rows = [(0.9, 0.0003, 4), (0.8, 0.5, 7), (0.7, 0.5, 4), (0.6, 0.25, 4)]
    trials = [(value, {"optim.lr": lr, "seed": seed}) for value, lr, seed in rows]
    question = confirm.of(searched(tmp_path, *words, top=3, trials=trials))
    assert list(question.space.by_label) == [
        "defaults", "no. 2 (trial 1): optim.lr=0.5", "no. 3 (trial 3): optim.lr=0.25",
    ]  # fmt: skip
    assert question.settings.seeds == [8, 9, 10]
    for top, said in (
        (4, r"--top \(sweep.confirm.top\) must be <= 3, the settings of the finished trials, got 4"),
        (1, "the best of the finished trials is grid's own defaults: there is nothing to confirm"),
    ):
        with pytest.raises(ValueError, match=said):
            confirm.of(asked(tmp_path, *words, f"sweep.confirm.top={top}"))


def test_a_trials_own_keys_and_the_words_of_its_choices(tmp_path):
    words = ("method=opd,fire_opd", "method.alpha=interval(0,2)", "rollout.suppressed=[1,2],[3]", "sweep.name=own")
    words += ("sweep.sampler=random", "sweep.trials=2")
    trials = [
        (0.5, {"method": "opd", "rollout.suppressed": "[3]"}),
        (0.25, {"method": "fire_opd", "method.alpha": 1.5, "rollout.suppressed": "[1,2]"}),
    ]
    question = confirm.of(searched(tmp_path, *words, top=2, trials=trials))
    _, one, two = (question.runs(point)[0] for point in question.space.points())
    assert (one[0].method, one[1].rollout.suppressed) == ("opd", [3])
    assert (two[0].method, two[1].rollout.suppressed, two[1].method["alpha"]) == ("fire_opd", [1, 2], 1.5)


def test_of_several_objectives_those_that_no_trial_beats_by_the_first(tmp_path):
    words = (*SEARCH, "sweep.objective={eval/validation/avg_at_2: maximize, cost/teacher_scored_tokens: minimize}")
    trials = [
        ((0.5, 10.0), {"optim.lr": 0.1}),
        ((0.5, 20.0), {"optim.lr": 0.2}),  # beaten by the first
        ((0.9, 90.0), {"optim.lr": 0.3}),
        ((0.7, 50.0), {"optim.lr": 0.4}),
    ]
    question = confirm.of(searched(tmp_path, *words, top=2, trials=trials))
    assert list(question.space.by_label)[1:] == ["best (trial 2): optim.lr=0.3", "no. 2 (trial 3): optim.lr=0.4"]
    with pytest.raises(ValueError, match="must be <= 3, the settings of the trials that no other one beats"):
        confirm.of(asked(tmp_path, *words, "sweep.confirm.top=4"))


def test_what_cannot_be_confirmed(tmp_path):
    with pytest.raises(ValueError, match=r"there is no sweep search in .*; it has none"):
        confirm.of(asked(tmp_path, *SEARCH, "sweep.confirm.top=1"))
    question = searched(tmp_path, *SEARCH, trials=[one for one in FIVE if not isinstance(one[0], float)])
    with pytest.raises(ValueError, match=r"no finished trial to confirm, of 2 begun \(1 pruned, 1 failed\)"):
        confirm.of(question)
    for change, words in (
        ("optim.warmup_steps=3", "optim.warmup_steps: .* -> 3; confirm it with what it was begun with"),
        ("optim.lr=interval(0,2)", r"optim.lr: interval\(0.0,1.0\) -> interval\(0.0,2.0\); confirm it with"),
    ):
        with pytest.raises(ValueError, match=words):
            given = [word for word in SEARCH if word.split("=")[0] != change.split("=")[0]]
            confirm.of(asked(tmp_path, *given, change, "sweep.confirm.top=1"))
    with owner.alone(owner.home(tmp_path) / "search"), pytest.raises(ValueError, match="search is running already"):
        confirm.of(question)
    with pytest.raises(ValueError, match="there is no study search in sqlite"):
        confirm.of(asked(tmp_path, *SEARCH, f"sweep.storage=sqlite:///{tmp_path}/x.db", "sweep.confirm.top=1"))


def test_a_confirmation_begun_with_other_points_is_refused_by_a_name_that_helps(tmp_path):
    question = confirm.of(searched(tmp_path, *SEARCH, trials=FIVE))
    run._study(question, question.samples[0][1], owner.home(tmp_path) / question.name)
    again = confirm.of(searched(tmp_path, *SEARCH, trials=[(0.875, {"optim.lr": 0.25})]))
    with pytest.raises(ValueError, match=r"points.best \(trial 2\): {optim.lr=0.5} -> absent.*sweep.confirm.name=NAME"):
        run._study(again, again.samples[0][1], owner.home(tmp_path) / again.name)
    named = confirm.of(asked(tmp_path, *SEARCH, "sweep.confirm.top=1", "sweep.confirm.name=second"))
    assert (named.name, named.samples[0][1].tracking.experiment) == ("second", "second")


def gain(row: str, gain: float, p: float, speaks: str = "problems and seeds", problems: int = 200) -> dict:
    said = {"method": row, "gain": gain, "gain_low": gain - 0.03, "gain_high": gain + 0.03, "p_holm": p}
    said |= {"separated": p <= 0.05, "speaks_of": speaks, "problems": problems}
    return said | dict.fromkeys(("improvement", "improvement_low", "improvement_high"), 0.5)


def test_one_line_says_whether_a_point_can_be_told_from_the_first():
    import pandas as pd

    names = ("plain", "up", "down", "same", "one seed", "blind", "lost")
    space = points.parse({name: {"x": place} if place else {} for place, name in enumerate(names)})
    label = dict(zip(names, space.by_label))
    row = {label[name]: f"opd {name}" for name in names if name != "lost"}
    gains = pd.DataFrame(
        [
            gain("opd up", 0.05, 0.004),
            gain("opd down", -0.05, 1e-5),
            gain("opd same", 0.01, 0.5),
            gain("opd one seed", 0.05, 0.01, "problems"),
            gain("opd blind", float("nan"), float("nan"), "nothing", 0),
        ]
    )
    found = SimpleNamespace(gains=gains, comparisons=5)
    tail = "(Holm over 5 comparisons); this speaks of other problems"
    assert verdict.lines(space, found, row) == [
        f"up is better than plain: accuracy +0.050 [+0.020, +0.080] on 200 test problems, p = 0.004 {tail} and "
        "other seeds",
        f"down is worse than plain: accuracy -0.050 [-0.080, -0.020] on 200 test problems, p < 0.001 {tail} and "
        "other seeds",
        f"same cannot be told from plain: accuracy +0.010 [-0.020, +0.040] on 200 test problems, p = 0.500 {tail} "
        "and other seeds",
        f"one seed is better than plain: accuracy +0.050 [+0.020, +0.080] on 200 test problems, p = 0.010 {tail}",
        "blind cannot be told from plain: the test problems have no answers",
        "lost did not finish: nothing can be told of it",
    ]
    del row[label["plain"]]
    assert verdict.lines(space, found, row) == [
        f"{name} did not finish: nothing can be told of it" for name in ("plain", "lost")
    ]


@pytest.mark.slow
def test_the_lab_confirms_a_sweep_killed_and_resumed(tmp_path):
    assert command("sweep", "smoke", "threads=1", cwd=tmp_path).returncode == 0
    asks = ["confirm", "smoke", "--top", "2", "threads=1"]
    assert "points.defaults = {}" in command(*asks, "--dry-run", cwd=tmp_path).stdout
    assert not (tmp_path / "opd_runs" / "optuna" / "smoke_confirm").exists()
    env = os.environ | {"PYTHONPATH": str(config.ROOT)}
    words = [sys.executable, "-m", "opd_lab", *asks, "launcher.slots=1"]
    killed = subprocess.Popen(words, cwd=tmp_path, env=env, start_new_session=True)
    folder = tmp_path / "opd_runs" / "optuna" / "smoke_confirm"
    try:
        wait_for(lambda: any(one["kind"] == "run" for one in Mail(folder / "trial_0000").events()), 120)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    done = command(*asks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = JournalStorage(JournalFileBackend(f"{folder}.journal"))
    trials = study.get_all_trials(0)
    assert [(t.state.name, t.user_attrs["attempts"]) for t in trials] == [("COMPLETE", 2), ("COMPLETE", 1)]
    assert trials[0].params["point"] == "defaults"
    (told,) = [line for line in done.stdout.splitlines() if "defaults: accuracy " in line]
    assert "(Holm over 1 comparison); this speaks of other problems and other seeds" in told
    assert told in (folder / "sweep.md").read_text()
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'opd_runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("smoke_confirm").experiment_id])
    kinds = [one.data.tags["kind"] for one in runs]
    assert (kinds.count("sweep"), kinds.count("trial"), kinds.count("run"), len(kinds)) == (1, 2, 6, 9)
    assert {one.data.tags["seed"] for one in runs if one.data.tags["kind"] == "run"} == {"1", "2", "3"}
    assert {one.info.status for one in runs} == {"FINISHED"}
    names = sorted(one.info.run_name for one in runs if one.data.tags["kind"] == "trial")
    assert names == ["trial 0, defaults", f"trial 1, {trials[1].params['point']}"]
    (sweep,) = (one for one in runs if one.data.tags["kind"] == "sweep")
    assert told in sweep.data.tags["mlflow.note.content"]
    again = command(*asks, cwd=tmp_path)
    assert told in again.stdout and "started" not in again.stdout
