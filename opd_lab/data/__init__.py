"""Prompts in, graded answers out."""
