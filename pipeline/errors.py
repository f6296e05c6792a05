"""Errors that a person can act on: each message says what is wrong, where, and how to mend it.

Everything else that is raised is a bug, and keeps its traceback.
"""

from __future__ import annotations


class MillstreamError(Exception):
    """Base of all errors that Millstream raises on purpose. Shown without a traceback."""

    exit_code = 1


class ConfigError(MillstreamError):
    """The configuration, or what it points at, cannot work. Exit code 78 (EX_CONFIG of sysexits.h)."""

    exit_code = 78


class DataError(MillstreamError):
    """A data set, shard or sample is missing, damaged or of a kind that is not read."""


class CheckpointError(MillstreamError):
    """A checkpoint is missing, damaged, or does not fit what is being restored."""


class RunError(MillstreamError):
    """A run cannot start or go on: it is already active, out of restarts, or asks for more than the cluster has."""
