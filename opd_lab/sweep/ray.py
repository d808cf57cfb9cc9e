"""Trials as tasks of a Ray cluster. Ray queues them, places them by what they need, and notices when a node is gone.

Trials end with their sweep: Ray stops the tasks of a driver that is gone. A trial whose worker or node dies fails
alone; `sweep.retries` decides whether it is tried again.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from opd_lab.sweep import cluster
from opd_lab.sweep.contract import Ended
from opd_lab.sweep.keeper import keep
from opd_lab.sweep.settings import RaySettings

GIB, MIB = 1 << 30, 1 << 20
CONNECT_SECONDS = 5.0


class RayLauncher(cluster.ClusterLauncher):
    """A `Launcher`.

    Raises:
        ValueError: Ray is not installed, cannot be reached, or has no node with room for a trial.
    """

    Settings = RaySettings

    def __init__(self, settings: RaySettings) -> None:
        s = settings
        for name, low in (("cpus", 1), ("gpus", 0), ("memory_gib", 0), ("grace_seconds", 0)):
            cluster.check(name, getattr(s, name), low)
        self._auto = s.slots == "auto"
        if not self._auto and (not isinstance(s.slots, int) or s.slots < 1):
            raise ValueError(f"launcher.slots must be >= 1 or auto, got {s.slots}")
        self._ray = _connect(s)
        self._needs = {"CPU": float(s.cpus), "GPU": float(s.gpus), **s.resources}
        self._needs |= {"memory": s.memory_gib * GIB} if s.memory_gib else {}
        super().__init__(0 if self._auto else int(s.slots), int(s.cpus), s.poll_seconds, s.grace_seconds)
        if self._auto:
            self._look()
            if not self.slots:
                largest = max(_nodes(self._ray), key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
                self.close()
                raise ValueError(
                    f"launcher: no node of the Ray cluster has {_text(self._needs)}, the largest has {_text(largest)}; "
                    "ask for less, or give launcher.slots=NUMBER if nodes are still to come"
                )
        self._task = self._ray.remote(
            num_cpus=s.cpus,
            num_gpus=s.gpus,
            memory=self._needs.get("memory"),
            resources=dict(s.resources),
            runtime_env=dict(s.runtime_env),
            max_retries=0,
            max_calls=1,
        )(keep)
        self._environment = cluster.environment(self.threads, s.gpus)
        self._numbers = count()

    def start(self, folder: Path) -> tuple[Any, str]:
        return self._task.remote(str(folder), self._environment), f"ray {next(self._numbers)}"

    def wait(self, handles: Sequence[Any], seconds: float) -> None:
        if handles:
            self._ray.wait(list(handles), num_returns=1, timeout=seconds)
        else:
            time.sleep(seconds)

    def ended(self, folder: Path, handle: Any) -> Ended | None:
        if not self._ray.wait([handle], timeout=0)[0]:
            return None
        if self._auto:
            self._look()  # a node may have come or gone
        try:
            return Ended(folder, self._ray.get(handle))
        except self._ray.exceptions.RayError as error:
            return Ended(folder, _said(error))

    def kill(self, handle: Any) -> None:
        self._ray.cancel(handle, force=True)

    def close(self) -> None:
        super().close()
        self._ray.shutdown()

    def _look(self) -> None:
        """As many slots as there is room for on the nodes that live, taken together."""
        needs = {name: need for name, need in self._needs.items() if need}
        self.slots = sum(min(int(node.get(name, 0) / needs[name]) for name in needs) for node in _nodes(self._ray))


def _connect(settings: RaySettings) -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if settings.address is None:  # Ray of this machine alone: reached from here only, its token never on the disk
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise cluster.missing("ray", "ray") from None
    own: Mapping[str, Any] = {"include_dashboard": False, "object_store_memory": settings.object_store_mib * MIB}
    try:
        if settings.address and ":" in settings.address:  # Ray itself would try for minutes
            host, _, port = settings.address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(
            address=settings.address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **own if settings.address is None else {},
        )
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        raise ValueError(
            f"launcher.address must be null (start Ray here), auto, HOST:PORT or ray://HOST:PORT of a cluster that "
            f"answers, got {settings.address}: {_said(error)}"
        ) from error
    return ray


def _nodes(ray: Any) -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]] or [{}]


def _said(error: Exception) -> str:
    """`NodeDiedError: Task failed due to the node dying.`"""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _text(resources: Mapping[str, float]) -> str:
    """`1 CPU, 2 GPU, 8.0 GiB`"""
    known = {name: resources[name] for name in sorted(resources) if ":" not in name and name != "object_store_memory"}
    return ", ".join(f"{n / GIB:.1f} GiB" if name == "memory" else f"{n:g} {name}" for name, n in known.items() if n)
