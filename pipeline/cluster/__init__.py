"""Attempts, workers and faults: the driver starts attempts under Ray or in one process and decides what follows."""
