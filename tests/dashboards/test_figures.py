"""Figures of runs made up by hand: what is drawn is what was worked out beside it."""

from __future__ import annotations

import base64
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from dashboard_runs import a_run
from optuna.storages.journal import JournalFileBackend
from optuna.trial import create_trial

from dashboards import style
from dashboards.figures import (
    accuracy,
    alarms,
    cost,
    divergence,
    estimators,
    paper_curves,
    papers,
    rollouts,
    sweep,
    tokens,
)
from dashboards.runs import AXES, Selected, curves, select
from opd_lab.bins import edges
from opd_lab.compare import budget
from opd_lab.compare import curves as compare
from opd_lab.tracking.run_folder import RunFolder
from opd_lab.tracking.tracker import RunInfo
from opd_lab.types import Report

RUN_FIGURES: list[Any] = [
    *(
        accuracy.accuracy,
        accuracy.final,
        accuracy.gains,
        divergence.kl,
        divergence.quantiles,
        divergence.probes,
        divergence.entropy,
    ),
    *(divergence.overlap, divergence.loss, divergence.histogram, divergence.positions, tokens.shares, cost.seconds),
    *(cost.tokens, alarms.timeline, estimators.lens, papers.kl_map, papers.support, papers.pass_at_k, sweep.response),
]


def numbers(values: Any) -> list[float]:
    """What Plotly keeps of an array, as floats."""
    if isinstance(values, dict):
        values = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
    return [float(value) for value in np.asarray(values).ravel()]


@pytest.fixture
def two(tmp_path: Path) -> Selected:
    """opd with seeds that end at .5 and .7, kat with one."""
    a_run(tmp_path, "opd", 0, final=0.5)
    a_run(tmp_path, "opd", 1, final=0.7)
    a_run(tmp_path, "kat", 0, final=0.9)
    return select(tmp_path)


def test_a_curve_is_what_the_comparison_says(two: Selected) -> None:
    drawn = curves(two, "kl/reverse_mean_nats")
    rows = compare.curves(two.folders, "kl/reverse_mean_nats")
    for line in drawn:
        said = rows[rows["method"] == line.label].drop(columns="method").reset_index(drop=True)
        pd.testing.assert_frame_equal(line.points[list(said)], said, check_dtype=False)
    opd, kat = (line.points for line in drawn)
    assert opd["mean"].tolist() == pytest.approx([0.45, 0.25])
    half = 12.706205 * 0.05  # t(1), the standard error of .4 and .5
    assert (opd["low"][0], opd["high"][0]) == pytest.approx((0, 0.45 + half))
    assert kat["speaks_of"].unique().tolist() == ["nothing"]


def test_a_band_says_what_it_is_and_is_cut_where_it_is_wider_than_what_was_seen(two: Selected) -> None:
    figure = divergence.kl(two)
    note = style.words(figure)["note"]
    assert "Line: mean over seeds; band: 95 % interval over seeds; a method with one seed has none." in note
    assert "The axis cuts bands" in note
    least, most = math.log10(0.2), math.log10(0.5)
    reach = 0.5 * (most - least)
    assert figure.layout.yaxis.range == pytest.approx((least - reach, most + reach))
    line = next(trace for trace in figure.data if trace.name == "opd")
    assert "95 % [%{customdata[1]:.6g}, %{customdata[2]:.6g}] over seeds" in line.hovertemplate
    assert numbers(line.customdata)[:3] == pytest.approx([1, 0, 0.45 + 12.706205 * 0.05])


def test_the_parts_of_the_teachers_tokens_add_up_to_the_table(two: Selected) -> None:
    parts = {bar.name: numbers(bar.x)[0] for bar in cost.tokens(two).data}
    assert parts == {"student wrote": 200, "teacher scored": 100}
    row = two.compared().rows.iloc[0]
    assert (row["student_tokens"], row["teacher_tokens"]) == (200, 100)
    spent = {"scored": 100, "prefix": 50, "cached": 20, "decoded": 30, "generated": 10}
    rows = [{"step": 1, "name": f"cost/teacher_{name}_tokens", "value": value} for name, value in spent.items()]
    assert list(budget.tokens(pd.DataFrame(rows)).values()) == [0, 100, 30, 30]


@pytest.mark.parametrize(
    ("x", "spent"),
    [
        ("steps", [0, 1, 2]),
        ("student_tokens", [0, 100, 200]),
        ("teacher_tokens", [0, 50, 100]),
        ("seconds", [0, 2, 4]),
        # Student of 10 parameters: (2 + 6) 10 per token written; teacher of 30: 2 30 per token scored.
        ("flops", [0, 100 * 80 + 50 * 60, 200 * 80 + 100 * 60]),
    ],
)
def test_every_axis_says_what_had_been_spent(two: Selected, x: str, spent: list[float]) -> None:
    assert curves(two, "eval/validation/avg_at_4", x)[0].points["x"].tolist() == pytest.approx(spent)
    figure = accuracy.accuracy(two, x)
    assert figure.layout.xaxis.title.text == AXES[x]


def test_a_long_run_is_thinned_and_the_note_says_so(tmp_path: Path) -> None:
    tracker = RunFolder()
    tracker.start(RunInfo(name="a", experiment="x", folder=tmp_path / "a", params={}, tags={}, config_yaml=""))
    for step in range(1001):
        tracker.log(Report(step, {"kl/reverse_mean_nats": 1.0 + step}))
    (line,) = curves(select(tmp_path), "kl/reverse_mean_nats")
    assert (line.every, len(line.points)) == (5, 201)  # every fifth of 1,001 steps, and the last
    assert line.points["mean"].tolist()[-1] == 1001.0
    assert "Every 5th step is drawn" in style.words(divergence.kl(select(tmp_path)))["note"]


def test_a_heat_map_shows_shares_of_the_pooled_counts_on_the_bins_of_all_runs(two: Selected) -> None:
    figure = divergence.histogram(two)
    opd = figure.data[0]
    counts = np.array(numbers(opd.customdata)).reshape(-1, 2)
    assert counts.sum(0).tolist() == [8, 8]  # four tokens per seed and step
    z = np.array(numbers(opd.z)).reshape(-1, 2)
    inner = edges("kl_nats")
    first = next(k for k, e in enumerate(inner) if e >= 2e-3)  # the lowest bin that anybody hit
    of = {value: next(k for k, e in enumerate(inner) if e >= value) - first for value in (2e-3, 0.2, 2.0)}
    assert counts[[of[2e-3], of[0.2], of[2.0]], 0].tolist() == [2, 4, 2]
    assert z[of[0.2], 0] == pytest.approx(math.log10(0.5), abs=1e-6)
    assert math.isnan(z[of[2e-3] + 1, 0])
    assert list(figure.data[1].y) == list(opd.y)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-4, 0)


def test_token_types_of_two_seeds_are_pooled_by_their_tokens(two: Selected) -> None:
    found = tokens.types(two).query("method == 'opd'").set_index("token")
    assert found["count"].to_dict() == {"now": 20, "<b>": 60}
    assert found["kl_share_fraction"].to_dict() == pytest.approx({"now": 40 / 50, "<b>": 6 / 50})
    assert found["enrichment_ratio"]["now"] == pytest.approx(0.8 / 0.1)
    assert found["persistence_fraction"]["now"] == 0.5
    assert list(found.index) == ["now", "<b>"]  # the largest share first


def test_what_no_type_has_is_no_column_and_all_of_them_fit_beside_each_other(two: Selected) -> None:
    assert list(tokens.types(two)) == [name for name in tokens.COLUMNS if name != "quadrant"]
    assert sum(column.pixels for column in tokens.COLUMNS.values()) <= 930  # what a window of 1,400 leaves a table


def test_a_short_context_still_shows_its_token() -> None:
    assert tokens.near("7 ? <assistant> 4 plus 7 makes 33 ,⟦now⟧41") == "…makes 33 ,⟦now⟧41"
    assert tokens.near("4 ⟦plus⟧ 7") == "4 ⟦plus⟧ 7"


def test_rollouts_are_paired_by_prompt(two: Selected) -> None:
    pairs = rollouts.pairs(two, "opd", "kat")
    assert [(a["prompt"], b["prompt"]) for a, b in pairs] == [("what? 1", "what? 1"), ("what? 2", "what? 2")]
    assert pairs[0][0]["folder"] != pairs[0][1]["folder"]
    assert rollouts.pairs(two, "opd", "nobody") == []


def test_unlike_losses_are_refused_with_the_guards_words_in_place_of_the_figure(tmp_path: Path) -> None:
    a_run(tmp_path, "opd")
    a_run(tmp_path, "kat")
    assert len(divergence.loss(select(tmp_path)).data) == 2
    a_run(tmp_path, "mse", divergence="hidden_l2")
    refused = divergence.loss(select(tmp_path))
    assert not refused.data
    said = style.words(refused)["empty"]
    assert "divergence: reverse_kl" in said
    assert "have no common unit; draw what means the same for every method: probe/reverse_kl_mean_nats" in said


def test_two_conventions_of_the_jsd_are_refused(tmp_path: Path) -> None:
    a_run(tmp_path, "jsd", divergence="jsd", beta="0.3")
    a_run(tmp_path, "other", divergence="jsd", beta="0.7")
    assert "beta: 0.3 " in style.words(divergence.loss(select(tmp_path)))["empty"]


def axis(figure: Any) -> Any:
    return figure.layout.yaxis


def test_an_axis_of_less_than_two_decades_has_numbers_between_the_powers_of_ten(two: Selected) -> None:
    assert axis(divergence.kl(two)).dtick is None  # 0.2 to 0.5 nats


def test_an_axis_of_many_decades_has_a_number_at_each(tmp_path: Path) -> None:
    tracker = RunFolder()
    tracker.start(RunInfo(name="a", experiment="x", folder=tmp_path / "a", params={}, tags={}, config_yaml=""))
    for step, value in enumerate((1.0, 0.1, 0.01)):
        tracker.log(Report(step, {"kl/reverse_mean_nats": value}))
    assert axis(divergence.kl(select(tmp_path))).dtick == 1


def test_a_band_has_no_marks_of_its_own(tmp_path: Path) -> None:
    for seed in (0, 1):
        a_run(tmp_path, "opd", seed)
    bands = [trace for trace in divergence.kl(select(tmp_path)).data if trace.fill == "toself"]
    assert [band.mode for band in bands] == ["lines"]


def test_the_parts_of_a_runs_time_add_up(two: Selected) -> None:
    parts = {bar.name: numbers(bar.x)[0] for bar in cost.seconds(two).data}
    # Two steps of 2 s: 1 + .25 + .5 and the rest.
    assert parts == pytest.approx(
        {"rollout": 2, "teacher": 0.5, "update": 1, "diagnostics": 0, "other": 0.5, "evaluation": 0}
    )


def test_plain_runs_are_trials_of_a_study(tmp_path: Path) -> None:
    for lr, final in ((1e-4, 0.3), (1e-3, 0.8), (1e-2, 0.5)):
        a_run(tmp_path, "opd", lr=lr, final=final)
    found = select(tmp_path)
    study = sweep.study_of(found)
    assert study is not None
    assert study.best_params == {"optim.lr": 1e-3}
    assert study.best_value == 0.8
    assert study.trials[0].distributions["optim.lr"].log is True  # over a factor of 100
    assert sweep.searchable(found) == ["optim.lr"]
    figure = sweep.response(found, "optim.lr")
    assert figure.layout.xaxis.type == "log"
    assert sorted(numbers(figure.data[0].y)) == [0.3, 0.5, 0.8]
    shown = [style.words(figure)["question"] for figure in sweep.overview(study)]
    assert "Which settings do good trials have in common?" in shown


def test_a_method_keeps_its_label_where_some_runs_are_left_out(tmp_path: Path) -> None:
    """0.8844 and 0.8845 need four digits as long as both are there, the second of which has not finished."""
    for lr, status in ((0.88441, "FINISHED"), (0.88449, "FAILED"), (0.2, "FINISHED")):
        a_run(tmp_path, "opd", lr=lr, status=status)
    found = select(tmp_path)
    assert found.labels == ["opd optim.lr=0.8844", "opd optim.lr=0.8845", "opd optim.lr=0.2"]
    assert list(found.compared().rows["method"]) == ["opd optim.lr=0.8844", "opd optim.lr=0.2"]
    one = found.only(["opd optim.lr=0.8844"])
    assert list(one.compared().rows["method"]) == ["opd optim.lr=0.8844"]
    assert style.words(accuracy.final(one))["question"]


def test_a_setting_that_only_tells_methods_apart_was_not_searched(tmp_path: Path) -> None:
    """`own` is a key of one method alone; with two values of it there is something to see, for that method only."""
    a_run(tmp_path, "opd")
    a_run(tmp_path, "scope", own="left", final=0.3)
    assert sweep.searchable(select(tmp_path)) == []
    a_run(tmp_path, "scope", own="right", final=0.6)
    found = select(tmp_path)
    assert sweep.searchable(found) == ["method.own"]
    figure = sweep.response(found, "method.own")
    assert figure.layout.xaxis.type == "category"
    assert [(list(dots.x), list(dots.y)) for dots in figure.data[::2]] == [(["left", "right"], [0.3, 0.6])]


def test_the_study_that_made_the_runs_is_found_with_what_it_pruned(tmp_path: Path) -> None:
    home = tmp_path / "x"
    runs = [a_run(home, "opd", lr=lr) for lr in (1e-3, 1e-2, 1e-1)]
    (tmp_path / "optuna").mkdir()
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "optuna" / "mine.journal")))
    study = optuna.create_study(storage=storage, direction="maximize")
    rates = {"optim.lr": optuna.distributions.FloatDistribution(1e-4, 1, log=True)}
    for lr, run in zip((1e-3, 1e-2, 1e-1), runs):
        said = {"runs": [str(run)]}
        study.add_trial(create_trial(params={"optim.lr": lr}, distributions=rates, value=lr, user_attrs=said))
    values, state = {1: 0.1}, optuna.trial.TrialState.PRUNED
    study.add_trial(
        create_trial(params={"optim.lr": 1.0}, distributions=rates, intermediate_values=values, state=state, value=0.1)
    )
    found = sweep.study_with(select(home))
    assert found is not None
    assert style.words(sweep.pruned(found))["note"] == "Of 4 trials: 3 complete, 1 pruned."
    a_run(tmp_path / "elsewhere", "opd")
    assert sweep.study_with(select(tmp_path / "elsewhere")) is None


def test_the_arms_of_the_rocks_stand_beside_plain_opd_with_the_intervals_of_the_comparison(tmp_path: Path) -> None:
    for method in ("opd", "opd_sampled", "rock_tokens", "rock_tokens_random_positions"):
        for seed, final in enumerate((0.5, 0.7)):
            a_run(tmp_path, method, seed, final=final)
    found = select(tmp_path)
    figure = paper_curves.rock_arms(found)
    assert {trace.name for trace in figure.data if trace.name} == {"opd", "rock_tokens", "rock_tokens_random_positions"}
    rows = compare.curves(tmp_path, "eval/validation/avg_at_4").query("method == 'rock_tokens' and step == 2").iloc[0]
    line = next(trace for trace in figure.data if trace.name == "rock_tokens")
    step, low, high, *_ = np.array(numbers(line.customdata)).reshape(3, -1)[-1]
    assert (step, low, high) == pytest.approx((2, rows["low"], rows["high"]))
    assert "figure 5" in style.words(figure)["note"] and "95 % interval" in style.words(figure)["note"]
    question = style.words(figure)["question"]
    assert question in [style.words(one)["question"] for one in papers.every(found)]
    assert question not in [style.words(one)["question"] for one in papers.every(found.only(["opd", "opd_sampled"]))]


def test_alarms_are_listed_in_the_order_of_steps(tmp_path: Path) -> None:
    tracker = RunFolder()
    tracker.start(RunInfo(name="a", experiment="x", folder=tmp_path / "a", params={}, tags={}, config_yaml=""))
    for step, name in ((4, "repetition"), (2, "zero_weight")):
        row = {"step": step, "alarm": name, "value": 1.0, "threshold": 0.5, "message": "too many"}
        tracker.log(Report(step, {"x": 1.0}, tables={"alarms": [row]}))
    assert alarms.rows(select(tmp_path))["alarm"].to_list() == ["zero_weight", "repetition"]
    assert "a: zero_weight at step 2" in style.words(alarms.timeline(select(tmp_path)))["alt"]


@pytest.mark.parametrize("draw", RUN_FIGURES)
def test_a_figure_without_data_says_what_to_do(draw: Any, tmp_path: Path) -> None:
    tracker = RunFolder()
    tracker.start(RunInfo(name="a", experiment="x", folder=tmp_path / "a", params={}, tags={}, config_yaml=""))
    figure = draw(select(tmp_path))
    words = style.words(figure)
    assert words["question"].endswith("?")
    assert len(words["empty"]) > 20
    assert words["empty"] in " ".join(figure.layout.annotations[0].text.split("<br>"))


@pytest.mark.parametrize("draw", RUN_FIGURES)
def test_a_figure_asks_a_question_names_its_axes_and_speaks_for_who_cannot_see_it(draw: Any, two: Selected) -> None:
    figure = draw(two)
    words = style.words(figure)
    if words["empty"]:
        assert draw in (divergence.probes, alarms.timeline, estimators.lens, papers.support, sweep.response)
        return
    assert words["question"].endswith("?")
    assert len(words["alt"]) > 40
    assert figure.layout.xaxis.title.text or draw in (divergence.histogram, divergence.positions)
    assert all(trace.hovertemplate or trace.hoverinfo == "skip" for trace in figure.data)


def test_dashboards_need_no_torch() -> None:
    code = """
import sys
import importlib, pkgutil, dashboards.figures
for package in (dashboards, dashboards.figures):
    for found in pkgutil.iter_modules(package.__path__):
        if found.name != "app":
            importlib.import_module(f"{package.__name__}.{found.name}")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
