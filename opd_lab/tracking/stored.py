"""Runs out of an MLflow store, in bulk. MLflow has no call for many histories at once, hence two ways beside its own:

- a run that has ended left all its scalars as parquet beside the store; a database is asked whether it has as many;
- a store that is a database (SQLite, PostgreSQL) is asked in SQL, and only read.

What is left, a run that is still going on behind an MLflow server or in another store, costs one call per metric,
which is slow.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

if TYPE_CHECKING:
    from array import array

    import pyarrow as pa
    from mlflow import MlflowClient
    from sqlalchemy import Connection

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")  # what MLflow keeps its tables in
PAGE = 1000  # runs that a server lists at a time
PARAMS = "params.json"  # a file of the run: all its settings, typed, of which MLflow's params are some

Named = tuple[str, str, "pa.Table | None"]  # run, folder, rows


@dataclass(frozen=True)
class Run:
    """A run of the store: where its files are, and its row of `read.runs`."""

    id: str
    files: str  # URI
    row: dict[str, Any]

    def named(self, rows: pa.Table | None) -> Named:
        return self.row["run"], self.row["folder"], rows


@dataclass(frozen=True)
class Store:
    """An MLflow store by its tracking URI; `experiment` None = all of them."""

    uri: str
    experiment: str | None = None

    def runs(self) -> list[Run]:
        """In the order of their names.

        Raises:
            ValueError: the store cannot be read, or holds no run of the experiment.
        """
        with self._asked() as ask:
            return ask.runs()

    def rows(self) -> list[dict[str, Any]]:
        """Of `read.runs`."""
        with tempfile.TemporaryDirectory() as scratch:
            runs = self.runs()
            files = [_files(self.uri, run, (PARAMS,), Path(scratch)) for run in runs]
            return [run.row | _params(folder) for run, folder in zip(runs, files)]

    def metrics(self, names: Sequence[str] | None, of_folder: Callable[..., pa.Table]) -> list[Named]:
        """step, name, value of every run. `of_folder(folder, names)` reads the files of one that has ended."""
        with self._asked() as ask, tempfile.TemporaryDirectory() as scratch:
            runs = ask.runs()
            if names is not None and isinstance(ask, _Database):
                return ask.histories(runs, names)
            places = [
                _files(self.uri, run, ("metrics.parquet", "timing.parquet"), Path(scratch))
                if run.row["ended"]
                else None
                for run in runs
            ]
            left = [None if folder is None else of_folder(folder, names) for folder in places]
            sizes = ask.sizes() if any(left) else {}
            whole = [one is not None and sizes.get(run.id, len(one)) == len(one) for run, one in zip(runs, left)]
            rest = [run for run, is_whole in zip(runs, whole) if not is_whole]
            return [
                *(run.named(one) for run, one, is_whole in zip(runs, left, whole) if is_whole),
                *ask.histories(rest, names),
            ]

    def table(self, name: str, of_folder: Callable[[Path, str], pa.Table | None]) -> list[Named]:
        """A table that runs left as parquet, of every run."""
        with tempfile.TemporaryDirectory() as scratch:
            places = [(run, _files(self.uri, run, (f"{name}.parquet",), Path(scratch))) for run in self.runs()]
            return [run.named(None if folder is None else of_folder(folder, name)) for run, folder in places]

    @contextmanager
    def _asked(self) -> Iterator[_Database | _Server]:
        if urlparse(self.uri).scheme.split("+")[0] not in DATABASES:
            from mlflow.exceptions import MlflowException

            try:
                yield _Server(self)
            except MlflowException as error:
                raise _unreadable(self.uri, error) from error
            return
        from sqlalchemy import create_engine
        from sqlalchemy.exc import SQLAlchemyError

        from opd_lab.tracking.rows import reader

        engine = (
            create_engine("sqlite://", creator=lambda: reader(_path(self.uri)))
            if _is_sqlite(self.uri)
            else create_engine(self.uri)
        )
        try:
            with engine.connect() as connection:
                yield _Database(self, connection)
        except SQLAlchemyError as error:
            raise _unreadable(self.uri, error) from error
        finally:
            engine.dispose()


class _Database:
    """A store's tables."""

    def __init__(self, store: Store, connection: Connection) -> None:
        self._store, self._connection = store, connection

    def runs(self) -> list[Run]:
        found = self._ask(
            "select r.run_uuid as run_id, r.name as run_name, r.status, r.start_time, r.end_time, r.artifact_uri, "
            "e.name as experiment from runs r join experiments e on e.experiment_id = r.experiment_id "
            "where r.lifecycle_stage = 'active' "
            "order by e.name, r.name, r.run_uuid"
        )
        mine = [row for row in found if self._store.experiment in (None, row.experiment)]
        if not mine:
            raise _empty(self._store, {row.experiment for row in found})
        params, tags = self._texts("params"), self._texts("tags")
        return [_run(row, params.get(row.run_id, {}), tags.get(row.run_id, {}), row.experiment) for row in mine]

    def sizes(self) -> dict[str, int]:
        """How many scalars the store has of each run."""
        return dict(tuple(row) for row in self._ask("select run_uuid, count(*) from metrics group by run_uuid"))

    def histories(self, runs: Sequence[Run], names: Sequence[str] | None) -> list[Named]:
        import pyarrow as pa

        from opd_lab.tracking import rows

        ids = [run.id for run in runs]
        if _is_sqlite(self._store.uri):
            found = rows.sqlite(_path(self._store.uri), ids, names)
        elif names is not None:
            codes = rows.Codes((id, place) for place, id in enumerate(ids))
            found = rows.by_run([self._numbers(rows.OF_NAME, codes, name=name) for name in names], names, len(ids))
        else:
            codes = rows.Codes()
            found = (rows.batch(self._numbers(rows.OF_RUN, codes, run=id), list(codes)) for id in ids)
        return [run.named(pa.Table.from_batches([batch])) for run, batch in zip(runs, found)]

    def _numbers(self, sql: str, codes: dict[str, float], **about: str) -> array[float]:
        from sqlalchemy import text

        from opd_lab.tracking.rows import flat

        cursor: Any = self._connection.execute(text(sql), about).cursor  # its rows as they come, not SQLAlchemy's
        return flat((value, twice, codes[name]) for value, twice, name in cursor)

    def _texts(self, kind: str) -> dict[str, dict[str, str]]:
        """The params or tags of every run."""
        out: dict[str, dict[str, str]] = {}
        for run, key, value in self._ask(f"select run_uuid, key, value from {kind} order by key"):
            out.setdefault(run, {})[key] = value
        return out

    def _ask(self, sql: str) -> Sequence[Any]:
        from sqlalchemy import text

        return self._connection.execute(text(sql)).fetchall()


class _Server:
    """A store behind HTTP, or whatever else MLflow has a client for."""

    def __init__(self, store: Store) -> None:
        self._store, self._client = store, _client(store.uri)

    def runs(self) -> list[Run]:
        names = {e.experiment_id: e.name for e in self._client.search_experiments()}
        mine = [id for id, name in names.items() if self._store.experiment in (None, name)]
        out: list[Run] = []
        token = ""
        while mine and token is not None:
            page = self._client.search_runs(
                mine, order_by=["attribute.run_name"], max_results=PAGE, page_token=token or None
            )
            out += [_run(run.info, run.data.params, run.data.tags, names[run.info.experiment_id]) for run in page]
            token = page.token
        if not out:
            raise _empty(self._store, set(names.values()))
        return out

    def sizes(self) -> dict[str, int]:
        """A server does not say."""
        return {}

    def histories(self, runs: Sequence[Run], names: Sequence[str] | None) -> list[Named]:
        import pyarrow as pa

        out = []
        for run in runs:
            have = sorted(self._client.get_run(run.id).data.metrics)
            wanted = have if names is None else [name for name in names if name in have]
            rows = [m for name in wanted for m in self._client.get_metric_history(run.id, name)]
            columns = {"step": [m.step for m in rows], "name": [m.key for m in rows], "value": [m.value for m in rows]}
            found = pa.table(
                columns, schema=pa.schema({"step": pa.int64(), "name": pa.string(), "value": pa.float64()})
            )
            at = found.schema.get_field_index("name")
            out.append(run.named(found.set_column(at, "name", found["name"].dictionary_encode())))
        return out


def _run(info: Any, params: dict[str, str], tags: dict[str, str], experiment: str) -> Run:
    """`info` is MLflow's RunInfo, or has its fields. What MLflow keeps as text becomes what it was, ms seconds."""
    commit = tags.get("mlflow.source.git.commit", "unknown")
    row = {
        "run": info.run_name,
        "folder": f"runs:/{info.run_id}",
        "experiment": experiment,
        "status": info.status,
        "started": info.start_time / 1000,
        "ended": None if info.end_time is None else info.end_time / 1000,
        "commit": None if commit == "unknown" else commit,
        "parent": tags.get("mlflow.parentRunId"),
    }
    row |= {key: value for key, value in tags.items() if not key.startswith("mlflow.")}
    return Run(info.run_id, info.artifact_uri, row | {key: _value(text) for key, text in params.items()})


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _params(folder: Path | None) -> dict[str, Any]:
    return {} if folder is None else json.loads((folder / PARAMS).read_text())


def _files(uri: str, run: Run, names: Sequence[str], scratch: Path) -> Path | None:
    """A folder with those of a run's files that there are; None where the first is missing."""
    place = urlparse(run.files)
    if place.scheme in ("", "file"):
        folder = Path(unquote(place.path))
        return folder if (folder / names[0]).is_file() else None
    from mlflow.exceptions import MlflowException

    folder, client = scratch / run.id, _client(uri)
    folder.mkdir()
    try:
        there = {file.path for file in client.list_artifacts(run.id)}
        for name in there.intersection(names):
            client.download_artifacts(run.id, name, str(folder))
    except MlflowException as error:
        raise _unreadable(uri, error) from error
    return folder if names[0] in there else None


def quiet() -> None:
    """Before MLflow is imported: no telemetry, no progress bars, no long silence where a server is away."""
    os.environ.update(
        MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"
    )
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for noisy in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _client(uri: str) -> MlflowClient:
    quiet()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _is_sqlite(uri: str) -> bool:
    return uri.startswith("sqlite:///")


def _path(uri: str) -> str:
    return uri.removeprefix("sqlite:///")


def _unreadable(uri: str, error: Exception) -> ValueError:
    return ValueError(
        f"a store must be the URI of an MLflow store that can be read, got {uri}: "
        f"{type(error).__name__}: {str(error).splitlines()[0]}; start one with `opd-lab run`"
    )


def _empty(store: Store, experiments: set[str]) -> ValueError:
    return ValueError(
        f"{store.uri} holds no run"
        + (f" of the experiment {store.experiment}" if store.experiment else "")
        + f"; experiments with runs: {', '.join(sorted(experiments)) or 'none'}"
    )
