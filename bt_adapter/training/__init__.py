"""Shared by all trainings: settings, processes, the loop, checkpoints and the log."""
