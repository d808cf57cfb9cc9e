"""How busy the machine is, under the names by which MLflow knows its system metrics.

MLflow's own monitor counts steps of its own and would mix them with the run's; this is asked at the run's steps.
"""

from __future__ import annotations

import torch

MEGABYTE = 1e6


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
            free, total = torch.cuda.mem_get_info(gpu)
            out[f"system/gpu_{gpu}_memory_usage_megabytes"] = (total - free) / MEGABYTE
        return out
