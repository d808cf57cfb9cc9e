"""Pictures of runs: one function per question, a Plotly figure out.

Runs are read through `opd_lab.tracking.read` and `opd_lab.compare` only; nothing here imports torch.
"""
