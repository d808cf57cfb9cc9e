"""The run folder: everything a run leaves behind, as plain files that outlive any service.

    config.yaml  environment.txt  code.diff   what was run
    status.json                               name, status, params, tags; rewritten as they change
    journal.jsonl                             the scalars, one line per report, as they come, with the time
    dropped.jsonl                             lines that a resumed run dropped, until it has ended
    segments/<table>/<first>-<last>-<n>.parquet   histograms and tables of some steps, as they come
    metrics.parquet  timing.parquet           the journal's rows (step, name, value), at the end
    <table>.parquet                           the segments, merged at the end

What a clock, an allocator or the machine says (`time/*`, `memory/*`, `system/*`, `*_per_second`) has its own file,
timing.parquet, so that two runs of one seed have the same metrics.parquet byte for byte. A resumed run drops what it
will log again; but a step that is done twice keeps what the clock said the first time, for that is what a store may
have been told.

To write a small file costs more than what is in it, so reports of up to `together_seconds` are written together. What
a checkpoint was made after is written before it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from opd_lab.tracking.origin import code_diff, commit, environment

if TYPE_CHECKING:  # readers of run folders do without torch
    from opd_lab.tracking.tracker import RunInfo
    from opd_lab.types import Report


JOURNAL = "journal.jsonl"
BEFORE = "00000000-before.parquet"  # the segment of a resumed run that holds all steps before


def within(step: int, segment: Path) -> bool:
    """Whether a segment may hold rows of a step."""
    return segment.name == BEFORE or int(segment.name[:8]) <= step <= int(segment.name[9:17])


def volatile(name: str) -> bool:
    """Whether a metric differs between two runs of one seed."""
    return name.startswith(("time/", "memory/", "system/")) or name.endswith("_per_second")


def now() -> float:
    """Seconds since 1970, to the millisecond, as MLflow keeps them."""
    return round(time.time(), 3)


class RunFolder:
    """A tracker that writes files."""

    name: ClassVar[str] = "run_folder"
    remote: ClassVar[bool] = False
    tables: ClassVar[Collection[str]] = ()

    def __init__(self, together_seconds: float = 0.0) -> None:
        self._together_seconds, self._due = together_seconds, 0.0
        self._waiting: list[tuple[Report, float]] = []  # and when each came
        self._written = 0  # segments

    def start(self, run: RunInfo) -> None:
        self._folder = run.folder
        before = _read_json(run.folder / "status.json")
        if run.step == 0 and before.get("status") == "FINISHED":
            raise ValueError(
                f"tracking.name must be the name of a new run, got {run.name}, whose folder {run.folder} holds a "
                "finished run; choose another name, or delete the folder"
            )
        run.folder.mkdir(parents=True, exist_ok=True)
        self._first = _rewind(run.folder, run.step)
        self._unsafe = [run.folder / JOURNAL, *(run.folder / "segments").glob("*/*.parquet")]
        self._keep("config.yaml", run.config_yaml, run.step)
        self._keep("environment.txt", environment(), run.step)
        self._keep("code.diff", code_diff(), run.step)
        self._status: dict[str, Any] = {
            "name": run.name,
            "experiment": run.experiment,
            "status": "RUNNING",
            "started": before.get("started", now()) if run.step else now(),
            "ended": None,
            "commit": commit(),
            "parent": run.parent,
            "dataset": dict(run.dataset),
            "params": dict(run.params),
            "tags": before.get("tags", {}) | dict(run.tags) if run.step else dict(run.tags),
        }
        self._save_status()

    def log(self, report: Report) -> None:
        self._waiting.append((report, now()))
        if time.monotonic() >= self._due:
            self._write_waiting()

    def _write_waiting(self) -> None:
        """The tables first: a report is there once its line is in the journal."""
        tables: dict[str, list[dict[str, Any]]] = {}
        lines = []
        for report, at in self._waiting:
            for name, rows in _tables(report).items():
                tables.setdefault(name, []).extend({"step": report.step, **row} for row in rows)
            first = self._first.get(report.step, {"time": at, "scalars": {}})
            said = {n: v for n, v in first["scalars"].items() if volatile(n) and n in report.scalars}
            lines.append({"step": report.step, "time": first["time"], "scalars": report.scalars | said})
        for name, rows in tables.items():
            self._segment(name, rows)
        with (self._folder / JOURNAL).open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._waiting, self._due = [], time.monotonic() + self._together_seconds

    def flush(self) -> None:
        """Have the disk write what was logged so far: at a checkpoint, which is worth nothing without it."""
        self._write_waiting()
        for path in {*self._unsafe, *(path.parent for path in self._unsafe)}:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        self._unsafe = [self._folder / JOURNAL]

    def artifact(self, path: Path, folder: str = "") -> None:
        target = self._folder / folder / path.name
        if path.resolve() != target.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)

    def tag(self, name: str, value: str) -> None:
        self._status["tags"][name] = value
        self._save_status()

    def finish(self, status: str) -> None:
        self._write_waiting()
        close(self._folder, status)

    def _segment(self, name: str, rows: list[dict[str, Any]]) -> None:
        import pyarrow as pa

        if not rows:
            return
        folder = self._folder / "segments" / name
        if not folder.exists():
            folder.mkdir(parents=True)
        path = folder / f"{rows[0]['step']:08d}-{rows[-1]['step']:08d}-{self._written:06d}.parquet"
        columns = {column: None for row in rows for column in row}
        _write(path, pa.table({column: [row.get(column) for row in rows] for column in columns}))
        self._unsafe.append(path)
        self._written += 1

    def _keep(self, name: str, text: str, step: int) -> None:
        """A resumed run that differs from its beginning says so in a file beside the first."""
        path = self._folder / name
        if step and path.exists() and path.read_text() != text:
            path = path.with_name(f"{path.stem}.from_step_{step}{path.suffix}")
        path.write_text(text)

    def _save_status(self) -> None:
        _save_status(self._folder, self._status)


def _tables(report: Report) -> dict[str, list[dict[str, Any]]]:
    """A report's tables, its histograms as one of them."""
    histograms = [
        {"name": name, "bins": h.bins, "counts": h.counts_K.tolist()} for name, h in report.histograms.items()
    ]
    return report.tables | ({"histograms": histograms} if histograms else {})


def close(folder: Path, status: str) -> None:
    """Merge what came piece by piece, and say how the run ended."""
    rows = list(journal_rows(folder))
    for name, wanted in (("metrics", False), ("timing", True)):
        mine = [row for row in rows if volatile(row[1]) == wanted]
        _write(folder / f"{name}.parquet", _metric_table(mine))
    for segments in sorted((folder / "segments").glob("*/")):
        _write(folder / f"{segments.name}.parquet", read_table(folder, segments.name))
    shutil.rmtree(folder / "segments", ignore_errors=True)
    (folder / "dropped.jsonl").unlink(missing_ok=True)
    _save_status(folder, _read_json(folder / "status.json") | {"status": status, "ended": now()})


def _save_status(folder: Path, status: dict[str, Any]) -> None:
    path = folder / "status.tmp"
    path.write_text(json.dumps(status, indent=1))
    path.replace(folder / "status.json")


def journal_rows(folder: Path) -> Iterable[tuple[int, str, float]]:
    """(step, name, value) of every scalar in the journal; a line torn by a crash is passed over."""
    for line in _journal(folder):
        for name, value in line["scalars"].items():
            yield line["step"], name, value


def read_table(folder: Path, name: str, dictionary: Sequence[str] = ()) -> Any:
    """A table of a run, finished or not, as a pyarrow table; None where the run has none. `dictionary` names columns
    of texts that are few."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = folder / f"{name}.parquet"
    paths = [whole] if whole.exists() else sorted((folder / "segments" / name).glob("*.parquet"))
    if not paths:
        return None
    read = [pq.ParquetFile(path, read_dictionary=list(dictionary)).read() for path in paths]
    return pa.concat_tables(read, promote_options="permissive")


def _journal(folder: Path) -> list[dict[str, Any]]:
    return list(_lines(folder / JOURNAL))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (line for line, _ in lines_from(path, 0))


def lines_from(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of a file of JSON lines from a byte on, and the byte at which each ends."""
    with path.open("rb") if path.exists() else io.BytesIO() as file:
        file.seek(offset)
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # torn by a crash, or just being written
                return
            offset += len(text)
            yield line, offset


def _rewind(folder: Path, step: int) -> dict[int, dict[str, Any]]:
    """Drop every row of `step` and later, and make a finished folder writable again. What the journal said of such a
    step when it was done first, by step: also kept in a file, for the run may be killed before it is back there."""
    lines, dropped = _journal(folder), folder / "dropped.jsonl"
    first = {line["step"]: line for line in _lines(dropped) if line["step"] >= step > 0}
    first = {line["step"]: line for line in lines if line["step"] >= step > 0} | first
    for path, kept in ((dropped, first.values()), (folder / JOURNAL, [line for line in lines if line["step"] < step])):
        path.with_suffix(".tmp").write_text("".join(json.dumps(line) + "\n" for line in kept))
        path.with_suffix(".tmp").replace(path)
    for path in (folder / "segments").glob("*/*.parquet"):
        if int(path.name[:8]) >= step:
            path.unlink()
        elif path.name == BEFORE or int(path.name[9:17]) >= step:
            _keep_before(step, path, path)
    for path in folder.glob("*.parquet"):
        if path.stem not in ("metrics", "timing"):
            shutil.rmtree(folder / "segments" / path.stem, ignore_errors=True)
            _keep_before(step, path, folder / "segments" / path.stem / BEFORE)
        path.unlink()
    return first


def _keep_before(step: int, path: Path, target: Path) -> None:
    """The rows of a table that come before a step."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read().filter(pc.field("step") < step)
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, table) if len(table) else target.unlink(missing_ok=True)


def _metric_table(rows: list[tuple[int, str, float]]) -> Any:
    import pyarrow as pa

    schema = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
    return pa.Table.from_pylist([dict(zip(schema.names, row)) for row in rows], schema=schema)


def _write(path: Path, table: Any) -> None:
    """All or nothing."""
    import pyarrow.parquet as pq

    pq.write_table(table, path.with_suffix(".tmp"), compression="zstd")
    path.with_suffix(".tmp").replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
