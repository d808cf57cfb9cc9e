"""Where a trial of this machine may run: so many at once on the CPU, or so many per GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

from opd_lab.sweep.settings import LocalSettings


@dataclass(frozen=True)
class Slot:
    name: str  # `slot 0`, `gpu 1`
    gpu: bool
    environment: Mapping[str, str] = field(default_factory=dict)  # set before torch is imported


def slots(settings: LocalSettings) -> list[Slot]:
    """The slots of this machine.

    Raises:
        ValueError: a setting that means no slot at all.
    """
    s = settings
    threads = {"OMP_NUM_THREADS": str(s.threads), "MKL_NUM_THREADS": str(s.threads)}
    for name, value in (("threads", s.threads), ("trials_per_gpu", s.trials_per_gpu), ("slots", s.slots)):
        if value != "auto" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"launcher.{name} must be >= 1{' or auto' if name == 'slots' else ''}, got {value}")
    if s.gpus is None:
        count = s.slots if isinstance(s.slots, int) else max(1, len(os.sched_getaffinity(0)) // s.threads)
        return [Slot(f"slot {n}", False, threads | {"CUDA_VISIBLE_DEVICES": ""}) for n in range(count)]
    found = _gpus() if s.gpus == "auto" else s.gpus
    if not isinstance(found, list) or not found:
        raise ValueError(
            f"launcher.gpus must be null, auto or a list of GPU numbers, got {s.gpus}"
            + ("; this machine shows no GPU, launcher.gpus=null runs on the CPU" if s.gpus == "auto" else "")
        )
    return [
        Slot(f"gpu {gpu}" + (f" #{n}" if s.trials_per_gpu > 1 else ""), True, threads | {"CUDA_VISIBLE_DEVICES": gpu})
        for n in range(s.trials_per_gpu)
        for gpu in map(str, found)
    ]


def _gpus() -> list[str]:
    """The GPUs this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True
    )
    return listed.stdout.split() if listed.returncode == 0 else []
