"""The rows of a database's table of scalars, run by run, as Arrow.

Python makes an object of every number that a database hands out, one thread at a time. So the runs of a large SQLite
file are dealt out to processes, each of which is this file as a program; it imports little, for it must begin fast.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain, pairwise
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    import pyarrow as pa

WORTH_A_PROCESS = 500_000  # rows: reading them takes much longer than a process takes to begin
NUMBERS = "select value, 2 * step + case when is_nan then 1 else 0 end"  # of what a row can be, the cheapest
OF_RUN = f"{NUMBERS}, key from metrics where run_uuid = :run"
OF_NAME = f"{NUMBERS}, run_uuid from metrics where key = :name"  # all of it is in the table's primary key
SIZE = "select sum(step + 1) from latest_metrics where run_uuid = :run"  # about how many rows, without counting them


class Codes(dict[Any, float]):
    """Names -> 0, 1, 2 ... in the order in which they are first asked for."""

    def __missing__(self, name: Any) -> float:
        return self.setdefault(name, float(len(self)))


def flat(rows: Iterable[Iterable[float]]) -> array[float]:
    """The rows found, with a code in place of the text: three numbers each."""
    return array("d", chain.from_iterable(rows))


def batch(numbers: Any, names: Iterable[str]) -> pa.RecordBatch:
    """step, name, value of the rows of one run."""
    import numpy as np
    import pyarrow as pa

    value_N, twice_N, code_N = np.frombuffer(numbers).reshape(-1, 3).T
    step_N, is_nan_N = np.divmod(twice_N.astype(np.int64), 2)
    name_N = pa.DictionaryArray.from_arrays(pa.array(code_N.astype(np.int32)), pa.array(names, pa.string()))
    return pa.record_batch({"step": step_N, "name": name_N, "value": np.where(is_nan_N, np.nan, value_N)})


def by_run(found: Sequence[array[float]], names: Sequence[str], runs: int) -> list[pa.RecordBatch]:
    """A batch for each of the runs 0, 1, ... out of the rows of one name after the other."""
    import numpy as np

    rows_N3 = np.concatenate([np.zeros((0, 3)), *(np.frombuffer(numbers).reshape(-1, 3) for numbers in found)])
    run_N = rows_N3[:, 2].astype(np.int32)
    rows_N3[:, 2] = np.repeat(np.arange(len(names)), [len(numbers) // 3 for numbers in found])
    order_N = np.argsort(run_N, kind="stable")
    rows_N3, ends = rows_N3[order_N], np.searchsorted(run_N[order_N], np.arange(runs + 1))
    return [batch(rows_N3[begin:end], names) for begin, end in pairwise(ends)]


def sqlite(path: str, runs: Sequence[str], names: Sequence[str] | None) -> Iterable[pa.RecordBatch]:
    """One batch per run."""
    with closing(reader(path)) as database:
        if names is not None:
            database.text_factory = Codes((run.encode(), place) for place, run in enumerate(runs)).__getitem__
            found = [flat(database.execute(OF_NAME, {"name": name})) for name in names]
            return by_run(found, names, len(runs))
        sizes = [database.execute(SIZE, {"run": run}).fetchone()[0] or 0 for run in runs]
    shares = min(_cores(), sum(sizes) // WORTH_A_PROCESS, len(runs))
    return (batch(*one) for one in (_dealt(path, runs, shares) if shares > 1 else _read(path, runs)))


def _read(path: str, runs: Sequence[str]) -> Iterator[tuple[array[float], list[str]]]:
    codes = Codes()
    with closing(reader(path)) as database:
        database.text_factory = codes.__getitem__  # a name leaves SQLite as its code
        for run in runs:
            numbers = flat(database.execute(OF_RUN, {"run": run}))
            yield numbers, [name.decode() for name in codes]


def _dealt(path: str, runs: Sequence[str], shares: int) -> Iterator[tuple[bytes, list[str]]]:
    """The same by `shares` processes, the runs in turn: one reads the next while another hands over its last."""
    command = [sys.executable, "-P", __file__, path]
    with ExitStack() as opened:
        children = [opened.enter_context(Popen(command, stdin=PIPE, stdout=PIPE)) for _ in range(shares)]
        for place, child in enumerate(children):
            assert child.stdin
            child.stdin.write(json.dumps(runs[place::shares]).encode())
            child.stdin.close()
        for place in range(len(runs)):
            source = children[place % shares].stdout
            assert source
            size, known = json.loads(source.readline())
            yield source.read(size), known


def reader(path: str) -> sqlite3.Connection:
    """A connection to a SQLite file that cannot write it."""
    return sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True)


def _cores() -> int:
    """Those that this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Standard input says which runs."""
    for numbers, known in _read(sys.argv[1], json.load(sys.stdin)):
        sys.stdout.buffer.write(json.dumps([len(numbers) * numbers.itemsize, known]).encode() + b"\n")
        sys.stdout.buffer.write(numbers)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
