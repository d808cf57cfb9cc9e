"""Trials as Slurm jobs, through submitit. The queue is Slurm's; a job outlives the sweep that submitted it.

A job that is preempted, or reaches its time limit, is submitted again under the same id and its trial goes on from its
last checkpoint. A sweep that is started again finds its jobs by the ids in the trials' folders.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_lab.sweep import cluster
from opd_lab.sweep.contract import Ended, Mail
from opd_lab.sweep.keeper import keep
from opd_lab.sweep.settings import SlurmSettings

JOBS = "submitit"  # in a trial's folder: submitit's own files,
NOTE = "submitit.json"  # the number of its job,
RESULT = "kept.json"  # and what became of that


@dataclass(frozen=True)
class Kept:
    """What submitit calls on the node: plain data, found again by its name."""

    environment: dict[str, str]

    def __call__(self, folder: str) -> None:
        killed = keep(folder, self.environment)
        _write(Path(folder) / RESULT, {"killed": killed})

    def checkpoint(self, folder: str) -> Any:
        """Called before a preempted job is submitted again. A run keeps its own checkpoints, so all that is left to do
        is to start it anew; the trial ends with this process."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folder)


@dataclass
class Job:
    submitted: Any  # submitit's
    over_since: float | None = None  # time.monotonic() when it was first seen to be over without a result


class SlurmLauncher(cluster.ClusterLauncher):
    """A `Launcher`.

    Raises:
        ValueError: submitit is not installed, there is no Slurm here, or an option is unknown.
    """

    Settings = SlurmSettings

    def __init__(self, settings: SlurmSettings) -> None:
        s = settings
        for name, low in (("slots", 1), ("minutes", 1), ("cpus", 1), ("gpus", 0), ("mem_gb", 0), ("grace_seconds", 0)):
            cluster.check(name, getattr(s, name), low)
        if s.cluster not in ("slurm", "local"):
            raise ValueError(f"launcher.cluster must be slurm or local, got {s.cluster}")
        super().__init__(s.slots, s.cpus, s.poll_seconds, s.grace_seconds)
        self._settings = s
        try:
            import submitit
            from submitit.core.utils import FailedJobError
        except ImportError:
            raise cluster.missing("submitit", "slurm") from None
        if s.cluster == "slurm" and shutil.which("srun") is None:
            raise ValueError(
                "launcher.cluster=slurm needs sbatch and srun in the PATH, got none; start the sweep where jobs are "
                "submitted, or try it with launcher.cluster=local"
            )
        self._submitit, self._refused = submitit, FailedJobError

    def start(self, folder: Path) -> tuple[Any, str]:
        s = self._settings
        (folder / RESULT).unlink(missing_ok=True)
        executor = self._submitit.AutoExecutor(
            folder / JOBS, cluster=s.cluster, slurm_max_num_timeout=s.timeouts, local_max_num_timeout=s.timeouts
        )
        executor.update_parameters(
            name=folder.name,
            timeout_min=s.minutes,
            cpus_per_task=s.cpus,
            gpus_per_node=s.gpus,
            mem_gb=s.mem_gb,
            stderr_to_stdout=True,
            slurm_partition=s.partition,
            slurm_signal_delay_s=s.signal_seconds,
            slurm_setup=list(s.setup) or None,
            slurm_additional_parameters=dict(s.additional) or None,
        )
        try:
            job = executor.submit(Kept(cluster.environment(s.cpus, s.gpus)), str(folder))
        except self._refused as error:
            raise ValueError(f"launcher: Slurm did not take the job, {str(error).strip()}") from error
        _write(folder / NOTE, {"cluster": s.cluster, "id": job.job_id, "attempt": _attempt(folder)})
        return Job(job), f"job {job.job_id}"

    def adopt(self, folder: Path) -> bool:
        """Also True for a job that has returned since: its trial must not run again."""
        note = folder / NOTE
        said = json.loads(note.read_text()) if note.exists() else None
        if said is None or said["attempt"] != _attempt(folder):
            return False
        if said["cluster"] == "local":  # nobody can wait for it any more
            _end_local(int(said["id"]), folder)
            return False
        job = self._submitit.SlurmJob(folder / JOBS, said["id"])
        lost = job.state == "UNKNOWN" or job.done(force_check=True)
        if lost and not (folder / RESULT).exists():
            job.cancel(check=False)
            return False
        self._running[folder] = cluster.Trial(Job(job))
        return True

    def ended(self, folder: Path, handle: Job) -> Ended | None:
        job, now = handle.submitted, time.monotonic()
        if not job.done():
            return None
        if (folder / RESULT).exists():
            return Ended(folder, json.loads((folder / RESULT).read_text())["killed"])
        handle.over_since = handle.over_since or now
        if now - handle.over_since < self._settings.lost_seconds:  # a shared disk may show it late
            return None
        return Ended(folder, f"job {job.job_id} ended as {job.state}, see {job.paths.stdout}")

    def kill(self, handle: Job) -> None:
        handle.submitted.cancel(check=False)


def _attempt(folder: Path) -> int | None:
    job = Mail(folder).job()
    return job.attempt if job else None


def _write(path: Path, said: Any) -> None:
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(said))
    whole.replace(path)


def _end_local(pid: int, folder: Path) -> None:
    """End a job of submitit's local executor, whose sweep has died: its number is a process."""
    import psutil

    try:
        controller = psutil.Process(pid)
        if str(folder / JOBS) in controller.cmdline():
            for process in (controller, *controller.children(recursive=True)):
                process.kill()
    except psutil.NoSuchProcess:
        pass
