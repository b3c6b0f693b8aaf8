"""Errors a user can act on. Each text says what was found, what was expected and what to do about it."""

from __future__ import annotations


class SlimdiffError(Exception):
    """Anything wrong with the user's input; the command line prints its text and exits with `exit_code`."""

    exit_code = 1


class ModelError(SlimdiffError):
    """The model cannot be found, read or compressed."""


class StatisticsError(SlimdiffError):
    """The statistics file is missing, damaged, empty, or belongs to another model."""


class BudgetError(SlimdiffError):
    """The budget cannot be met."""


class OutputError(SlimdiffError):
    """An output cannot be written where it was asked for."""
