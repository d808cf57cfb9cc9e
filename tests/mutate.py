"""Makes every change of `mutations.py` in the tree it lies in, one after the other, and prints pytest's exit codes, the
first one for the unchanged tree. Run it in a copy, as `test_mutations.py` does; a word limits it to files named so.

What every test imports is imported once; then each change is tried by a process of its own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

TREE = Path(__file__).resolve().parents[1]
QUIET = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


class Mutation(NamedTuple):
    file: str  # below opd_lab
    old: str  # occurs once in it
    new: str
    tests: str  # below tests, separated by blanks

    def changed(self) -> str:
        """The file's text with the change."""
        text = (TREE / "opd_lab" / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} must hold {self.old!r} once, got {text.count(self.old)}: correct the list")
        return text.replace(self.old, self.new)


def of(file: str, tests: str, *changes: tuple[str, ...]) -> list[Mutation]:
    """Changes to one file; a third text names other tests than the usual ones."""
    return [Mutation(file, *change[:2], *(change[2:] or (tests,))) for change in changes]


def tried(tests: str) -> int:
    """Pytest's exit code on these tests, in a process that imports the package anew. 1: a test failed. Its words go to
    stderr."""
    child = os.fork()
    if not child:
        code = 99
        try:
            os.dup2(2, 1)
            code = pytest.main([*QUIET, *(f"tests/{name}" for name in tests.split())])
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    import hydra
    import hypothesis
    import torch
    from mutations import MUTATIONS
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    assert [hydra, hypothesis, torch, AutoTokenizer, Qwen3ForCausalLM]  # what every test imports
    os.chdir(TREE)
    sys.dont_write_bytecode = True
    chosen = [mutation for mutation in MUTATIONS if all(word in mutation.file for word in sys.argv[1:])]
    named = " ".join(mutation.tests for mutation in chosen)
    print(tried(" ".join(dict.fromkeys(named.split()))), flush=True)
    for mutation in chosen:
        path = TREE / "opd_lab" / mutation.file
        text, changed = path.read_text(), mutation.changed()
        path.write_text(changed)
        print(tried(mutation.tests), flush=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
