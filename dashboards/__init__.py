"""Pictures of runs: one function per question, a Plotly figure out. Reads `opd_lab.tracking.read`; never imports torch."""
