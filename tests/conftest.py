"""What all tests share: one CPU thread, no network, no telemetry, and no CUDA device but for those that want one."""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr != "gpu":  # elsewhere `model.device=auto` is the CPU, where runs are equal bit for bit
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
