"""What all tests share: one CPU thread, no network, no telemetry."""

import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
