"""The Optuna study behind a sweep: where it is kept, what it asks, and what was decided. The sweep alone writes it."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from opd_lab.sweep.samplers import RETRY_OF, make_pruner, make_sampler
from opd_lab.sweep.settings import SweepSettings
from opd_lab.sweep.space import Params, Space

IDENTITY = "identity"  # user attribute of the study: what may not change when it goes on
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Study:
    """Asks for trials and keeps what became of them."""

    def __init__(self, study: optuna.Study, space: Space, target: int, retries: int) -> None:
        self.optuna, self.space, self.target, self._retries = study, space, target, retries

    def unfinished(self) -> list[tuple[optuna.Trial, Params]]:
        """The trials that ran when an earlier sweep was killed, in order. They keep their numbers; what was not drawn
        yet is drawn now."""
        running = self.optuna.get_trials(deepcopy=False, states=[TrialState.RUNNING])
        trials = [optuna.Trial(self.optuna, trial._trial_id) for trial in running]
        return [(trial, self.space.suggest(trial)) for trial in trials]

    def ask(self) -> tuple[optuna.Trial, Params] | None:
        """The next trial: a retry if one is due, else a new one, None if there are enough."""
        self._queue_retries()
        trials = self.trials()
        waiting = any(trial.state == TrialState.WAITING for trial in trials)
        if not waiting and sum(RETRY_OF not in trial.user_attrs for trial in trials) >= self.target:
            return None
        trial = self.optuna.ask()
        return trial, self.space.suggest(trial)

    def complete(self, trial: optuna.Trial, values: Sequence[float]) -> None:
        self.optuna.tell(trial, list(values))

    def prune(self, trial: optuna.Trial) -> None:
        """Its value is the last one reported."""
        self.optuna.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, why: str) -> None:
        trial.set_user_attr("why", why)
        self.optuna.tell(trial, state=TrialState.FAIL)

    def trials(self) -> list[FrozenTrial]:
        return self.optuna.get_trials(deepcopy=False)

    def count(self, *states: TrialState) -> int:
        return sum(trial.state in states for trial in self.trials())

    def count_ended(self) -> int:
        """Trials that count towards the target: every one that has ended, but not a failure and its retry twice."""
        return self.count(*ENDED) - len(self._repeated())

    def failures(self) -> int:
        """Trials that failed for good."""
        return sum(1 for trial in self.trials() if trial.state == TrialState.FAIL) - len(self._repeated())

    def best(self) -> FrozenTrial | None:
        """The best finished trial; None without one, or with several objectives."""
        if len(self.optuna.directions) > 1 or not self.count(TrialState.COMPLETE):
            return None
        return self.optuna.best_trial

    def card(self) -> dict[str, Any]:
        """How the study stands, for people who ask while it goes on."""
        best = self.best()
        done = [t for t in self.trials() if t.state == TrialState.COMPLETE and t.user_attrs.get("attempts") == 1]
        took = [t.duration.total_seconds() for t in done if t.duration]
        return {
            "name": self.optuna.study_name,
            "objective": self.optuna.metric_names,
            "done": self.count_ended(),
            "target": self.target,
            "pruned": self.count(TrialState.PRUNED),
            "failed": self.failures(),
            "best": None if best is None else {"trial": best.number, "value": best.value, "params": best.params},
            "trial_seconds": sum(took) / len(took) if took else None,  # wall time of a trial that nothing disturbed
        }

    def _queue_retries(self) -> None:
        repeated = self._repeated()
        for trial in self.trials():
            tries = trial.user_attrs.get("try", 1)
            if trial.state == TrialState.FAIL and trial.number not in repeated and tries <= self._retries:
                self.optuna.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number, "try": tries + 1})

    def _repeated(self) -> set[int]:
        """Numbers of the trials of which there is a retry."""
        return {trial.user_attrs[RETRY_OF] for trial in self.trials() if RETRY_OF in trial.user_attrs}


def open_study(
    name: str,
    uri: str,
    space: Space,
    settings: SweepSettings,
    objective: Mapping[str, str],
    identity: Mapping[str, Any],
    *,
    every: int,
    steps: int,
) -> Study:
    """The study of a sweep, made if need be.

    Raises:
        ValueError: it was begun with another space or config, or the storage cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    sampler = make_sampler(settings, space)
    points = len(space.points()) if settings.sampler in (None, "grid") else None
    target = settings.trials or points
    if target is None:
        raise ValueError(f"sweep.trials must be a number of trials for sweep.sampler={settings.sampler}, got null")
    if points is not None and target > points:
        raise ValueError(f"sweep.trials must be <= {points}, the points of the grid, got {target}")
    identity = plain({**identity, "trials": target})
    pruner = make_pruner(settings, every=every, steps=steps)
    storage = _storage(uri)
    study = optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True, sampler=sampler, pruner=pruner,
        directions=[StudyDirection[way.upper()] for way in objective.values()],
    )  # fmt: skip
    before = study.user_attrs.get(IDENTITY)
    if before is None:
        study.set_metric_names(list(objective))
        study.set_user_attr(IDENTITY, identity)
    elif before != identity:
        rename = "sweep.confirm.name" if settings.confirm.top else "tracking.experiment"
        refuse_changes(name, before, identity, extend=settings.extend, rename=rename)
        if _choices_changed(study, space):
            storage = _with_more_choices(study, uri, space)
            study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
        study.set_user_attr(IDENTITY, identity)
    return Study(study, space, target, settings.retries)


def reopen(name: str, uri: str) -> optuna.Study:
    """A study that was begun, to be read.

    Raises:
        ValueError: it is not there.
    """
    try:
        return optuna.load_study(study_name=name, storage=_storage(uri))
    except KeyError:
        raise ValueError(f"there is no study {name} in {masked(uri)}; sweep.storage says where else it is") from None


def refuse_changes(
    name: str, before: Mapping[str, Any], now: Mapping[str, Any], *, extend: bool, rename: str = "tracking.experiment"
) -> None:
    """Whether a study may go on. `rename`: the key that gives it another name.

    Raises:
        ValueError: names every difference.
    """
    differ = changes(before, now)
    allowed = all(differ.values())
    if differ and not (allowed and extend):
        remedy = (
            "add --extend to allow it (sweep.extend=true)" if allowed
            else f"take the change back, or give this sweep a name of its own: {rename}=NAME"
        )  # fmt: skip
        raise ValueError(f"the sweep {name} was begun differently: {'; '.join(differ)}; {remedy}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, bool]:
    """What differs between two identities, and whether a study may be extended by it."""
    found: dict[str, bool] = {}
    for group in ("space", "config"):
        old, new = before[group], now[group]
        methods = {key.partition(".")[0] for key in old}
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                more = _more_values(old.get(key), new.get(key)) if group == "space" else False
                if key.startswith(("points.", "method=")):  # a point or a method that it did not have
                    more = key not in old and (group == "space" or key.partition(".")[0] not in methods)
                found[f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"] = more
    for key in sorted((before.keys() | now.keys()) - {"space", "config"}):
        if before.get(key) != now.get(key):
            more = key == "trials" and now[key] > before[key]
            found[f"sweep.{key}: {before.get(key)} -> {now.get(key)}"] = more
    return found


def _more_values(old: str | None, new: str | None) -> bool:
    """Whether a choice only gained values, or a range or interval only grew."""
    if not old or not new or old.split("(")[0] != new.split("(")[0] or old.split(")")[-1] != new.split(")")[-1]:
        return False
    was, is_ = (text[text.index("(") + 1 : text.rindex(")")].split(",") for text in (old, new))
    if old.startswith("choice"):
        return set(was) <= set(is_)
    low, high, *step = map(float, was)
    low_now, high_now, *step_now = map(float, is_)
    return low_now <= low and high <= high_now and step == step_now


def _choices_changed(study: optuna.Study, space: Space) -> bool:
    now = {p.key: p.distribution for p in space.parameters}
    return any(
        isinstance(old, CategoricalDistribution) and now[key] != old
        for trial in study.get_trials(deepcopy=False)
        for key, old in trial.distributions.items()
    )


def _with_more_choices(study: optuna.Study, uri: str, space: Space) -> BaseStorage:
    """Optuna allows no new choice in a study, so its trials move to a new file of the same name."""
    if not uri.endswith(".journal"):
        raise ValueError(
            f"sweep.extend: more values of a choice need a journal file, got {masked(uri)}; begin another sweep"
        )
    now = {p.key: p.distribution for p in space.parameters}
    fresh = Path(uri).with_suffix(".new.journal")
    fresh.unlink(missing_ok=True)
    storage = _storage(str(fresh))
    moved = optuna.create_study(study_name=study.study_name, storage=storage, directions=study.directions)
    moved.set_metric_names(study.metric_names or [])
    for name, value in study.user_attrs.items():
        moved.set_user_attr(name, value)
    for trial in study.get_trials():
        trial.distributions = {key: now[key] for key in trial.params}
        moved.add_trial(trial)
    fresh.replace(uri)
    return _storage(uri)


def _storage(uri: str) -> BaseStorage:
    if uri.endswith(".journal"):
        path = Path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)
        return JournalStorage(JournalFileBackend(uri))
    try:
        return optuna.storages.RDBStorage(uri)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error.__cause__ or error).splitlines()[0]}"
        raise ValueError(
            "sweep.storage must be null, FILE.journal, or a database that can be written (sqlite:///FILE, "
            f"postgresql+psycopg://USER@HOST/NAME with pip install 'opd_lab[postgres]'), got {masked(uri)}: {reason}"
        ) from error


def masked(uri: str) -> str:
    """Without its password."""
    return re.sub(r"(://[^:@/]*):[^@/]*@", r"\1:***@", uri)


def _mend(journal: Path) -> None:
    """Remove what a killed sweep leaves: its lock, which Optuna would wait half a minute for, and half a line. Whoever
    calls this holds the sweep, so nobody else writes."""
    Path(f"{journal}.lock").unlink(missing_ok=True)
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)


def not_mlflow(uri: str, mlflow_uri: str) -> None:
    """MLflow and Optuna each keep the version of their tables under one name, so they cannot share a database.

    Raises:
        ValueError: they would.
    """
    if _database(uri) == _database(mlflow_uri):
        raise ValueError(
            f"sweep.storage must be another database than MLflow's, got {masked(uri)}; "
            "leave it null for a file of its own, or name another database"
        )


def _database(uri: str) -> tuple[Any, ...]:
    from sqlalchemy.engine import make_url

    if "://" not in uri or uri.startswith(("http", "file")):
        return (uri,)
    url = make_url(uri)
    kind = url.get_backend_name()
    name = str(Path(url.database or "").resolve()) if kind == "sqlite" else url.database
    return kind, url.host, url.port, name


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; NaN for one value."""
    if len(values) < 2:
        return math.nan
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def plain(value: Any) -> Any:
    """As JSON gives it back, so that what was stored can be compared."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))
