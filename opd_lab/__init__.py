"""opd_lab: compare On-Policy Distillation methods token by token, under one budget, on one code path."""

__version__ = "0.1.0"
