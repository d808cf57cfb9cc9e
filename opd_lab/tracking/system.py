"""How busy the machine is, under the names by which MLflow knows its system metrics.

MLflow's own monitor counts steps of its own and would mix them with the run's; this is asked at the run's steps.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

MEGABYTE = 1e6
NVML = find_spec("pynvml") is not None  # `pip install opd_lab[gpu]`


class System:
    """Asked again and again; the CPU's share is that of the time since it was last asked."""

    def __init__(self) -> None:
        import psutil

        self._psutil, self._process = psutil, psutil.Process()
        psutil.cpu_percent()

    def sample(self) -> dict[str, float]:
        """Megabytes (10^6 bytes) and percent, of the whole machine but for `process_*`."""
        memory = self._psutil.virtual_memory()
        out = {
            "system/cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": (memory.total - memory.available) / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_memory_usage_megabytes": self._process.memory_info().rss / MEGABYTE,
        }
        for gpu in range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ():
            out |= {f"system/gpu_{gpu}_{name}": value for name, value in _gpu(gpu).items()}
        return out


def _gpu(gpu: int) -> dict[str, float]:
    """A device; `process_peak` is the most that this process has held at once. Only the vendor's library knows how
    busy it is: without it, these two are absent."""
    free, total = torch.cuda.mem_get_info(gpu)
    out = {
        "memory_usage_megabytes": (total - free) / MEGABYTE,
        "memory_usage_percentage": 100 * (1 - free / total),
        "process_peak_megabytes": torch.cuda.max_memory_allocated(gpu) / MEGABYTE,
    }
    if NVML:
        out["utilization_percentage"] = float(torch.cuda.utilization(gpu))
        out["power_usage_watts"] = torch.cuda.power_draw(gpu) / 1000
    return out
