"""What a sweep says of itself: budgets and savings worked out by hand, slots, who holds it."""

import dataclasses

import optuna
import pytest
from bench import Bench, sweep_settings
from inline import Inline, one_process
from lab_sweep import asked
from optuna.trial import TrialState, create_trial
from rich.console import Console

from opd_lab.sweep import budget, found, owner, run
from opd_lab.sweep.settings import LocalSettings
from opd_lab.sweep.slots import slots

AUTO = {"kind": "local", "slots": "auto", "gpus": None, "trials_per_gpu": 1, "threads": 3, "memory_limit_gib": None}
AUTO |= {"start_seconds": 60.0, "poll_seconds": 0.1, "grace_seconds": 1.0}


def ended(state: TrialState, **said) -> optuna.trial.FrozenTrial:
    return create_trial(state=state, value=1.0, user_attrs=said)


def test_what_pruning_saved():
    trials = [
        ended(TrialState.COMPLETE, steps=10, of=10, tokens=1000.0, seconds=20.0),
        ended(TrialState.PRUNED, steps=2, of=10, tokens=100.0, seconds=36.0),  # 8 steps of 50 tokens and 18 s
        ended(TrialState.PRUNED, steps=4, of=10, tokens=400.0, seconds=24.0),  # 6 steps of 100 tokens and 6 s
    ]
    saved = found.saved(trials)
    assert (saved.trials, saved.steps, saved.student_tokens, saved.seconds) == (2, 14, 1000.0, 180.0)
    assert str(saved) == "pruning 2 trials saved 14 steps (47%), 1,000 student tokens and 3 min of training"


def test_the_budget_of_a_search_is_that_of_its_dearest_trials(tmp_path):
    words = ["sweep.sampler=random", "sweep.trials=3", "steps=choice(6,2,4)", "rollout.prompts=range(1,9)"]
    question = asked(tmp_path, "sweeps=smoke", *words, "rollout.per_prompt=2", "rollout.max_tokens=10", short=[])
    (said,) = [line for line in budget.lines(question, 2, "x", {}) if line.startswith("budget")]
    assert "at most 18 steps, 288 rollouts, 2,880 student tokens" in said  # 3 x 6; x 8 x 2; x 10


def test_the_same_question_in_another_experiment_is_another_study(tmp_path):
    assert asked(tmp_path, "sweeps=smoke", short=[]).name == "smoke"
    assert asked(tmp_path, "sweeps=smoke", "tracking.experiment=other", short=[]).name == "smoke-other"


def test_the_budget_of_a_dry_run(tmp_path, capsys):
    question = asked(tmp_path, "sweeps=smoke", "steps=2,4", "sweep.dry_run=true", short=[])
    assert run.run(question, Inline()) == 0
    out = capsys.readouterr().out
    assert "trials     4, 0 of them done" in out
    assert "at most 12 steps, 96 rollouts, 4,608 student tokens" in out  # 2 methods x (2 + 4) steps x 4 x 2 x 48
    assert "time       unknown" in out
    assert not (tmp_path / "optuna").exists()
    card = {"done": 1, "trial_seconds": 50.0}
    assert "time       about 75 s for what is left" in "\n".join(budget.lines(question, 2, "x", card))  # 3 x 50 / 2


def test_slots_of_gpus_and_of_the_cpu():
    s = AUTO
    made = slots(LocalSettings(**s | {"gpus": [0, 2], "trials_per_gpu": 2}))
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in made] == ["0", "2", "0", "2"]
    assert all(slot.gpu and slot.environment["OMP_NUM_THREADS"] == "3" for slot in made)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots(LocalSettings(**s | {"slots": 2}))] == ["", ""]
    for change, words in (
        ({"slots": 0}, "launcher.slots must be >= 1 or auto"),
        ({"gpus": []}, "launcher.gpus must be"),
    ):
        with pytest.raises(ValueError, match=words):
            slots(LocalSettings(**s | change))


def test_auto_takes_the_gpus_that_the_sweep_itself_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    made = slots(LocalSettings(**AUTO | {"gpus": "auto"}))
    assert [(slot.name, slot.environment["CUDA_VISIBLE_DEVICES"]) for slot in made] == [("gpu 3", "3"), ("gpu 5", "5")]


def test_no_gpu_where_none_is_shown(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    s = LocalSettings(**AUTO | {"gpus": "auto"})
    with pytest.raises(ValueError, match="this machine shows no GPU"):
        slots(s)


def test_one_process_holds_a_sweep_and_another_may_stop_it(tmp_path):
    folder = owner.home(tmp_path) / "mine"
    with pytest.raises(ValueError, match="there is no sweep mine"):
        owner.stop(tmp_path, "mine")
    with owner.alone(folder):
        card = {"name": "mine", "objective": ["kl"], "done": 1, "target": 3, "pruned": 0, "failed": 1, "best": None}
        owner.write_card(folder, card)
        assert owner.running(folder)
        with pytest.raises(ValueError, match="opd-lab stop mine ends it"), owner.alone(folder):
            pass
        owner.stop(tmp_path, "mine")
        assert (folder / owner.STOP).exists()
    assert not owner.running(folder)
    assert owner.stop(tmp_path, "mine") == "mine is not running"
    console = Console(width=120)
    with console.capture() as seen:
        console.print(owner.table(tmp_path))
    assert "stopped" in seen.get() and "1/3" in seen.get()


def test_the_table_the_note_and_the_page(tmp_path):
    question = dataclasses.replace(asked(tmp_path, "steps=2,4"), name="</script>")
    settings = sweep_settings(space={"top": [0.25, 0.5], "fate": ["well", "raises"]})
    bench = Bench(tmp_path, settings, launcher=Inline())
    with pytest.MonkeyPatch.context() as patch, one_process(bench.trials, patch):
        bench.run()
    frame = found.table(bench.study, ["value"])
    assert frame["value"].dropna().to_list() == [0.25, 0.5]
    assert frame["why"].to_list() == ["", "RuntimeError: no such luck"] * 2
    assert frame["student_tokens"].to_list() == [40.0, 20.0, 40.0, 20.0]
    note = found.note(question, bench.study)
    assert "| 2 | 0.5000 | 0.5 | well |" in note.splitlines()
    assert "Trial 1 failed: `RuntimeError: no such luck`" in note
    page = found.page(question, bench.study)
    assert "&lt;/script&gt;" in page and "cdn" not in page.split("<h2>")[0]
    assert page.count('<script src="http') == page.count("<link") == 0
    assert [t.number for t in found.ranked(bench.study)] == [2, 0]


def test_a_param_matters_that_good_values_need_also_where_there_are_several_objectives():
    """a: the good half is the work of x alone, the bad half that of y alone. b is small where a is large."""
    study = optuna.create_study(directions=["maximize", "minimize"])
    space = {name: optuna.distributions.FloatDistribution(0, 1) for name in "xy"}
    for x in range(20):
        for y in range(5):
            a = x / 20 if x >= 10 else y / 20
            at = {"x": x / 19, "y": y / 4}
            study.add_trial(create_trial(values=[a, -a], params=at, distributions=space))
    pictures = dict(found.figures(study, ["a", "b"]))
    for name in "ab":
        (bars,) = pictures[f"{name}: how much each param matters"].data
        share = dict(zip(bars.y, bars.x))
        assert share["x"] > 3 * share["y"]
