"""Evaluation: tasks, runs and reports that compare eviction policies with the full cache."""
