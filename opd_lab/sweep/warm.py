"""What a run would do once in every process, done once for all trials: imported by the server that forks them."""

from __future__ import annotations

import gc
from importlib import import_module

from opd_lab.tracking.origin import environment

for _name in (  # what a run imports, early or late
    *("opd_lab.run", "opd_lab.sweep.worker", "opd_lab.tracking.mlflow", "mlflow.store.tracking.sqlalchemy_store"),
    *("sqlalchemy.dialects.sqlite", "pandas", "pyarrow.parquet", "pyarrow.pandas_compat"),
    *("PIL.ImageDraw", "transformers.generation.utils"),
    "transformers.models.qwen3.modeling_qwen3",  # of the embedded lab
):
    import_module(_name)
environment()  # is remembered; it reads what is installed
gc.collect()
gc.freeze()  # a trial's collector need not go through what all of them share
