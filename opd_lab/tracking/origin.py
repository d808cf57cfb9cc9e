"""Where a run comes from: the code, to the last uncommitted line, and the versions around it."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import opd_lab

ROOT = Path(opd_lab.__file__).parent.parent


@cache
def commit() -> str | None:
    """The commit that the code stands on; None outside a git checkout."""
    return _git("rev-parse", "HEAD").strip() or None


def code_diff() -> str:
    """Every change since that commit, new files of the package and its configs included."""
    if commit() is None:
        return ""
    new = _git("ls-files", "--others", "--exclude-standard", "--", "opd_lab", "conf", "sweeps").splitlines()
    added = (_git("diff", "--no-index", "--", "/dev/null", path) for path in sorted(new))
    return "".join([_git("diff", "HEAD"), *added])


@cache
def environment() -> str:
    """Python, platform and every installed version, one to a line."""
    versions = {f"{d.name}=={d.version}" for d in distributions()}
    head = [f"python {platform.python_version()}", f"platform {platform.platform()}", f"commit {commit()}"]
    return "\n".join([*head, f"opd_lab {opd_lab.__version__}", *sorted(versions, key=str.lower)]) + "\n"


def _git(*arguments: str) -> str:
    """What git says; nothing where there is no git, or no checkout that holds this package."""
    try:
        done = subprocess.run(
            ["git", "-c", "core.quotepath=off", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 or "--no-index" in arguments else ""
