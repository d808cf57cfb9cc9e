"""Runs -> what may be said of their methods: tables with intervals, and the guard over what may share an axis."""
