"""Report -> run folder and MLflow. `read` is the one door back: tables, dashboards and notebooks come through it."""
