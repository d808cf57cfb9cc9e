"""Which hyperparameters matter, and where are the good values? Optuna's own pictures, of a study or of plain runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from dashboards import style
from dashboards.runs import Frame, Selected, params
from dashboards.style import dress, empty, short
from opd_lab.tracking import read

if TYPE_CHECKING:
    from optuna import Study

NOTHING = "Start a sweep over a hyperparameter, or wait until more trials have finished"
LOG_RATIO = 20.0  # of largest to smallest value from which a positive parameter is drawn on a logarithmic axis
LEAST_TRIALS = 3  # of which anything can be said


def studies(folder: Path) -> list[Path]:
    """The journals of the studies that belong to the runs below a folder, or beside it."""
    return sorted({path for home in (folder, folder.parent) for path in (home / "optuna").glob("*.journal")})


def study_with(selected: Selected) -> Study | None:
    """The stored study whose trials these runs are: it knows what was pruned as well. None if there is none."""
    mine = {folder.resolve() for folder in selected.folders}
    for home in dict.fromkeys(folder.parent for folder in selected.folders):
        for journal in studies(home):
            study = load(journal)
            if any(Path(run).resolve() in mine for trial in study.trials for run in trial.user_attrs.get("runs", ())):
                return study
    return None


def load(journal: Path) -> Study:
    """The study in a journal, read only."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    names = optuna.get_all_study_names(storage)
    if not names:
        raise ValueError(f"{journal} holds no study yet; wait for the sweep's first trial")
    return optuna.load_study(study_name=names[0], storage=storage)


def study_of(selected: Selected) -> Study | None:
    """Plain runs as trials of a study: what they differ in are the parameters, the objective the value. None if there
    are too few, or they differ in nothing that was searched."""
    import optuna

    table, objective = _objectives(selected)
    searched = [str(name) for name in table if _searched(name) and table[name].notna().all()]
    if len(table) < LEAST_TRIALS or not searched:
        return None
    distributions = {name: _distribution(table[name].tolist()) for name in searched}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize" if "kl" in objective else "maximize")
    for row in table.to_dict("records"):
        mine = {name: row[name] for name in searched}
        study.add_trial(optuna.trial.create_trial(params=mine, distributions=distributions, value=row["value"]))
    return study


def history(study: Study) -> go.Figure:
    return _optuna(study, "plot_optimization_history", "How good is the best trial so far?")


def parallel(study: Study) -> go.Figure:
    figure = _optuna(study, "plot_parallel_coordinate", "Which settings do good trials have in common?")
    return figure.update_layout(margin={"l": 110, "r": 60, "t": 110, "b": 40}) if figure.data else figure


def importance(study: Study) -> go.Figure:
    from optuna.importance import PedAnovaImportanceEvaluator

    question = "Which hyperparameters decide whether a trial is among the best?"
    if len({name for trial in study.trials for name in trial.params}) < 2:
        return empty(question, "It takes a search over two hyperparameters or more.")
    return _optuna(study, "plot_param_importances", question, evaluator=PedAnovaImportanceEvaluator())


def slices(study: Study) -> go.Figure:
    return _optuna(study, "plot_slice", "Where are the good values of each hyperparameter?")


def contour(study: Study) -> go.Figure:
    """The two parameters that matter most."""
    question = "How do two hyperparameters act together?"
    names = list({name: None for trial in study.trials for name in trial.params})
    if len(names) < 2:
        return empty(question, "It takes a search over two hyperparameters or more.")
    return _optuna(study, "plot_contour", question, params=names[:2])


def pruned(study: Study) -> go.Figure:
    """Every trial's values while it ran, the pruned ones ending early."""
    question = "Which trials were stopped early, and was it right?"
    if not any(trial.intermediate_values for trial in study.trials):
        return empty(question, "No trial reported values while it ran: start the sweep with a pruner.")
    figure: Any = _optuna(study, "plot_intermediate_values", question)
    states = [trial.state.name.lower() for trial in study.trials]
    said = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
    figure.layout.meta = {**figure.layout.meta, "note": f"Of {len(states)} trials: {said}."}
    return figure


FIGURES: dict[str, Callable[[Study], go.Figure]] = {
    "history": history,
    "parallel": parallel,
    "importance": importance,
    "slices": slices,
    "contour": contour,
    "pruned": pruned,
}


def response(selected: Selected, parameter: str = "optim.lr") -> go.Figure:
    """The objective of every run against one hyperparameter, a line per method through the means over seeds."""
    question = f"How does each method respond to {parameter}?"
    table, objective = _objectives(selected, keep=parameter)
    if not len(table) or parameter not in table or table[parameter].nunique() < 2:
        return empty(
            question, f"The finished runs here do not differ in {parameter}; choose another, or sweep over it."
        )
    table = table.dropna(subset=parameter)  # methods that have no such setting
    numbers: Frame = pd.to_numeric(table[parameter], errors="coerce")
    table = table.assign(at=table[parameter].astype(str) if numbers.isna().any() else numbers)
    figure = go.Figure()
    labels = selected.present(table)
    families = {label: _family(label) for label in labels}
    for family in dict.fromkeys(families.values()):
        mine = table[table["label"].map(families) == family]
        style = selected.styles[next(label for label in labels if families[label] == family)]
        mean = mine.groupby("at")["value"].mean()
        figure.add_trace(
            go.Scatter(
                x=mine["at"],
                y=mine["value"],
                mode="markers",
                legendgroup=family,
                showlegend=False,
                marker={"color": style.colour, "symbol": style.symbol, "opacity": 0.5},
                customdata=mine["run"],
                hovertemplate="%{customdata}<br>%{x}: %{y:.6g}<extra></extra>",
            )
        )
        line = {"color": style.colour, "dash": style.dash}
        figure.add_trace(
            go.Scatter(
                x=mean.index, y=mean, mode="lines", name=short(family), legendgroup=family, line=line, hoverinfo="skip"
            )
        )
    kind = "category" if numbers.isna().any() else "log" if _is_log(numbers.tolist()) else None
    figure.update_xaxes(title_text=parameter, type=kind)
    figure.update_yaxes(title_text=objective)
    best = table.loc[table["value"].idxmin() if "kl" in objective else table["value"].idxmax()]
    return dress(
        figure,
        question,
        alt=f"{objective} against {parameter}. Best run: {best['run']}, {best['value']:.4g} at {best[parameter]}.",
        note="A dot per run; lines join the means over runs with one value.",
    )


def searchable(selected: Selected) -> list[str]:
    """Hyperparameters in which runs of one method differ; what only tells methods apart was not searched."""
    table, _ = _objectives(selected)
    names = [name for name in table if _searched(name) and name != "method"]
    values: Frame = table.groupby(table["label"].map(_family))[names].nunique() if names else table
    return [name for name in names if values[name].max() > 1]


def _family(label: str) -> str:
    """The method of a label, without its settings."""
    return label.split(" ")[0]


def _objectives(selected: Selected, keep: str = "") -> tuple[Frame, str]:
    """run, label, value and the differing settings of every run that reported its objective; the objective's name."""
    folders = selected.folders
    if not folders:
        return pd.DataFrame(), ""
    objective = str(read.status(folders[0])["params"].get("objective", "eval/validation/avg_at_4"))
    found = selected.metrics([objective])
    if not len(found):
        return pd.DataFrame(), objective
    last = found.sort_values("step").groupby("folder").last()[["value", "label"]]
    table = params(folders, keep=keep).set_index("folder").join(last, how="inner").reset_index()
    return table.dropna(subset="value"), objective


def _searched(name: object) -> bool:
    """Settings, not identities: params have a dot, but for the method itself."""
    return name == "method" or ("." in str(name) and not str(name).endswith("_target_"))


def _distribution(values: list[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values) and len(set(values)) > 1:
        return FloatDistribution(min(values), max(values), log=_is_log(values))
    return CategoricalDistribution(sorted(set(values), key=str))


def _is_log(values: list[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= LOG_RATIO


def _optuna(study: Study, name: str, question: str, **chosen: Any) -> go.Figure:
    import optuna.visualization

    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if len(complete) < LEAST_TRIALS:
        return empty(question, f"{len(complete)} trials are complete; it takes {LEAST_TRIALS}. {NOTHING}.")
    if study.directions[1:]:
        chosen |= {"target": lambda trial: trial.values[0], "target_name": "first objective"}
    try:
        figure = getattr(optuna.visualization, name)(study, **chosen)
    except (ValueError, RuntimeError) as refusal:
        return empty(question, f"Optuna cannot draw it: {refusal}.")
    figure = go.Figure(figure.to_plotly_json()).update_layout(width=None, autosize=True)
    best = f"Best value {complete[0].values[0]:.4g}"
    if not study.directions[1:]:
        best = f"Best value {study.best_value:.6g} with " + ", ".join(
            f"{name}={value}" for name, value in study.best_params.items()
        )
    return dress(figure, question, alt=f"{best}; {len(study.trials)} trials.", height=440)


def overview(study: Study) -> list[go.Figure]:
    """All pictures of a study that can be drawn."""
    return [figure for draw in FIGURES.values() if not style.words(figure := draw(study))["empty"]]
