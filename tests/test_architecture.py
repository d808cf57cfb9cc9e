"""The shape of the package: imports point down one way, the science is pure, files stay readable."""

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opd_lab"
LAYERS = [
    *("bins", "types", "settings", "divergence", "methods", "chunk", "signals", "models", "pairing", "data", "rollout"),
    *("asking", "step", "teacher", "diagnostics", "tracking", "compare", "evaluate", "checkpoint", "optimize", "parts"),
    *("train", "preparation", "doctor", "config", "catalogue", "mistakes", "progress", "lab_models", "run"),
    *("results", "analyze", "sweep", "app", "cli", "__main__"),
]
BARE = ("types", "divergence", "methods", "chunk", "signals", "models", "rollout", "teacher", "step", "train")
HARD_LIMIT, MEDIAN_LIMIT = 400, 150  # lines


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.stat().st_size)


def imported(path: Path) -> set[str]:
    """First names below opd_lab that a file imports at module level or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "opd_lab":
            rest = node.module.split(".")[1:]
            names |= {rest[0]} if rest else {alias.name for alias in node.names}
    return names - {"__version__"}


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    if layer(path) == "__init__":
        return
    mine = LAYERS.index(layer(path))
    for name in imported(path):
        assert LAYERS.index(name) <= mine, f"{path.name} ({layer(path)}) must not import {name}, which lies above it"


def test_methods_import_torch_and_the_layers_below_alone():
    for path in (PACKAGE / "methods").glob("*.py"):
        tree = ast.parse(path.read_text())
        roots = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        roots -= set(sys.stdlib_module_names) | {"torch", "opd_lab"}
        assert not roots, f"{path.name} imports {roots}"
        assert imported(path) <= {"types", "divergence", "methods"}


def test_the_core_needs_torch_and_transformers_alone():
    """On a bare GPU machine there is no Hydra, no MLflow, no pandas."""
    banned = ("hydra", "omegaconf", "mlflow", "pandas", "pyarrow", "matplotlib", "optuna", "rich")
    code = f"""
import sys
for name in {banned!r}: sys.modules[name] = None
import importlib, pkgutil, opd_lab
for name in {BARE!r}:
    module = importlib.import_module("opd_lab." + name)
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        importlib.import_module(f"opd_lab.{{name}}.{{found.name}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_short():
    lines = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in modules()}
    long = {str(name): n for name, n in lines.items() if n > HARD_LIMIT}
    assert not long, f"split by idea: {long}"
    assert statistics.median(lines.values()) <= MEDIAN_LIMIT


def test_no_drawer_without_a_name():
    assert not [p for p in modules() if p.stem in ("utils", "util", "helpers", "common", "misc")]


def test_no_pickle():
    for path in modules():
        text = path.read_text()
        assert "pickle" not in text.replace("No pickle", ""), path
        assert "torch.load(" not in text, path
