"""A sweep killed at any write, its own or a trial's, goes on to the very table it would have had."""

import os
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from bench import Bench, sweep_settings
from inline import Inline, Killed, Writes, one_process
from optuna.trial import TrialState

from tests.tracking.services import postgres

RULES = {
    "pruning": {"startup_trials": 2, "warmup_steps": 0, "reduction_factor": 3, "patience": 1, "p_threshold": 0.1},
}
TPE = RULES | {
    "space": {"top": "interval(0,1)", "x": "tag(log,interval(1,100))", "kind": ["a", "b"]},
    "sampler": "tpe",
    "startup_trials": 3,
    "trials": 8,
    "pruner": "median",
}
GRID = {"space": {"top": [0.1, 0.3, 0.2], "fate": ["well", "raises"]}, "retries": 1}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def swept(folder: Path, patch: pytest.MonkeyPatch, settings: dict, seeds=(0,)) -> Bench:
    bench = Bench(folder, sweep_settings(**settings), launcher=Inline(), seeds=seeds)
    with one_process(bench.trials, patch):
        return bench.run()


def killed_and_resumed(folder: Path, patch: pytest.MonkeyPatch, settings: dict, fatal: int, seeds) -> tuple[Bench, set]:
    """The sweep, killed at a write, then started again; and the trials that had ended before."""
    with patch.context() as deadly:
        Writes(deadly, fatal)
        with pytest.raises(Killed):
            swept(folder, patch, settings, seeds)
    again = Bench(folder, sweep_settings(**settings), launcher=Inline(), seeds=seeds)
    ended = {t.number for t in again.study.trials() if t.state in (TrialState.COMPLETE, TrialState.PRUNED)}
    with one_process(again.trials, patch):
        return again.run(), ended


def kill_everywhere(folder: Path, patch: pytest.MonkeyPatch, settings: dict, every: int, seeds=(0,)) -> None:
    with patch.context() as counting:
        writes = Writes(counting)
        whole = swept(folder / "whole", patch, settings, seeds).table()
    assert len({row["state"] for row in whole}) == 2, "both kinds of end should be met"
    for fatal in range(2, writes.count + 1, every):
        again, ended = killed_and_resumed(folder / str(fatal), patch, settings, fatal, seeds)
        assert again.table() == whole, f"killed at write {fatal} of {writes.count}"
        assert not ended & set(again.trials.launcher.submitted), "a finished trial ran again"


def test_a_search_with_pruning(tmp_path, monkeypatch):
    kill_everywhere(tmp_path, monkeypatch, TPE, every=47)


def test_a_grid_with_failures_and_retries(tmp_path, monkeypatch):
    kill_everywhere(tmp_path, monkeypatch, GRID, every=43)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "every"),
    [
        (TPE, 11),
        (GRID, 11),
        (TPE | {"sampler": "qmc"}, 19),
        (TPE | {"pruner": "wilcoxon"}, 149),
        (TPE | {"pruner": "successive_halving"}, 7),
        (TPE | {"pruner": "hyperband"}, 7),
        ({"space": {"top": [0.4, 0.1, 0.2], "fate": ["well", "falls"]}, "pruner": "patient"} | RULES, 19),
    ],
)
def test_at_many_more_writes(tmp_path, monkeypatch, settings, every):
    kill_everywhere(tmp_path, monkeypatch, settings, every)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "gp", "cmaes", "nsgaii"])
def test_every_sampler_draws_what_it_would_have_drawn(tmp_path, monkeypatch, sampler):
    settings = TPE | {"sampler": sampler, "space": {"top": "interval(0,1)", "x": "tag(log,interval(1,100))"}}
    kill_everywhere(tmp_path, monkeypatch, settings | {"population": 4, "trials": 12}, every=19)


@pytest.mark.slow
def test_seeds_inside_a_trial(tmp_path, monkeypatch):
    kill_everywhere(tmp_path, monkeypatch, TPE | {"trials": 5, "seeds": [0, 1]}, every=29, seeds=(0, 1))


def test_a_dead_owners_lock_costs_no_time(tmp_path, monkeypatch):
    swept(tmp_path, monkeypatch, GRID)
    Path(f"{tmp_path / 'bench.journal'}.lock").symlink_to("bench.journal")
    begin = time.monotonic()
    swept(tmp_path, monkeypatch, GRID)
    assert time.monotonic() - begin < 5


def test_another_sweep_seed_draws_other_trials(tmp_path, monkeypatch):
    one, two, other = (
        swept(tmp_path / name, monkeypatch, TPE | {"seed": seed}).table()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == two != other


def test_a_changed_sweep_is_refused_with_the_difference(tmp_path, monkeypatch):
    swept(tmp_path, monkeypatch, GRID)
    for change, words in (
        (
            {"space": {"top": [0.1, 0.3], "fate": ["well"]}},
            r"fate: .*; top: choice\(0.1,0.3,0.2\) -> choice\(0.1,0.3\)",
        ),
        ({"space": {"top": [0.1, 0.3, 0.2]}}, r"fate: choice\(well,raises\) -> absent.*take the change back"),
        ({"sampler": "random", "trials": 6}, "sweep.sampler: None -> random"),
        ({"space": {"top": [0.1, 0.3, 0.2, 0.4], "fate": ["well", "raises"]}}, "add --extend"),
    ):
        with pytest.raises(ValueError, match=words):
            Bench(tmp_path, sweep_settings(**GRID | change), launcher=Inline())


def test_extend_adds_values_and_trials(tmp_path, monkeypatch):
    before = swept(tmp_path, monkeypatch, GRID).table()
    more = GRID | {"extend": True, "space": {"top": [0.1, 0.4, 0.3, 0.2], "fate": ["well", "raises"]}}
    after = swept(tmp_path, monkeypatch, more)
    assert after.table()[: len(before)] == before
    assert [(row["params"]["top"], row["state"]) for row in after.table()[len(before) :]] == [
        (0.4, "COMPLETE"), (0.4, "FAIL"), (0.4, "FAIL"),
    ]  # fmt: skip
    longer = swept(tmp_path / "tpe", monkeypatch, TPE).table()
    assert swept(tmp_path / "tpe", monkeypatch, TPE | {"trials": 10, "extend": True}).table()[:8] == longer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_keeps_a_study_as_well(tmp_path, monkeypatch, kind):
    settings = sweep_settings(**TPE)
    whole = swept(tmp_path / "file", monkeypatch, TPE).table()
    with ExitStack() as held:
        uri = f"sqlite:///{tmp_path}/study.db"
        if kind == "postgresql":
            uri = held.enter_context(postgres()).replace("postgresql:", "postgresql+psycopg:")
        for fatal in (9, 20, None):  # killed at two writes of the trials' files, then left alone
            bench = Bench(tmp_path, settings, launcher=Inline(), uri=uri)
            with monkeypatch.context() as deadly, one_process(bench.trials, monkeypatch):
                Writes(deadly, fatal)
                try:
                    bench.run()
                except Killed:
                    assert fatal is not None
            table = bench.table()
            bench.study.optuna._storage.remove_session()
            bench.study.optuna._storage._backend.engine.dispose()
        assert table == whole


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        (
            "postgresql+psycopg://lab:secret@127.0.0.1:1/x",
            r"got postgresql\+psycopg://lab:\*\*\*@.* connection .* failed",
        ),
        ("oracle+nothing://lab@127.0.0.1/x", "database that can be written.*opd_lab\\[postgres\\].*got oracle"),
        ("sqlite:////no/such/folder/x.db", "got sqlite:////no/such/folder/x.db: .*unable to open database file"),
        ("study.db", r"must be null, FILE.journal, or a database.*sqlite:///FILE.*got study\.db: "),
    ],
)
def test_a_database_that_cannot_be_opened(tmp_path, uri, words):
    with pytest.raises(ValueError, match=words) as refused:
        Bench(tmp_path, sweep_settings(**GRID), launcher=Inline(), uri=uri)
    assert "secret" not in str(refused.value)
