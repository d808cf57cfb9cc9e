"""The tests notice small wrong changes: each of `mutations.py` is made in a copy, and the tests it names must fail."""

import shutil
import subprocess
import sys

import pytest
from mutate import TREE, Mutation
from mutations import MUTATIONS

NAMES = [f"{mutation.file}: {mutation.old}" for mutation in MUTATIONS]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=NAMES)
def test_the_text_to_change_is_there(mutation: Mutation):
    mutation.changed()


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Pytest's exit codes: of the unchanged copy, then of each change."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("opd_lab", "conf", "sweeps", "tests"):
        shutil.copytree(TREE / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TREE / "pyproject.toml", copy)
    done = subprocess.run([sys.executable, "tests/mutate.py"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(code) for code in done.stdout.split()]


@pytest.mark.slow
def test_the_unchanged_copy_passes(codes: list[int]):
    assert codes[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=NAMES)
def test_a_wrong_change_is_noticed(codes: list[int], number: int):
    assert codes[number + 1] == 1, f"{MUTATIONS[number].tests} went through with {MUTATIONS[number].new}"
