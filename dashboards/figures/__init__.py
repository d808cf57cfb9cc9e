"""One function per question: runs under comparison in (`dashboards.runs.select`), a Plotly figure out."""
