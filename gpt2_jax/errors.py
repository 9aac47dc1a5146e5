"""Errors that a user can act on. Each is one line, and each class has the exit code of the commands."""


class Gpt2JaxError(Exception):
    """Base of every expected failure; a command prints its message without a traceback."""

    exit_code = 1


class UsageError(Gpt2JaxError):
    """What the user typed (a flag, a config value, a path) cannot be used."""

    exit_code = 2


class DataError(Gpt2JaxError):
    """What lies in a corpus, a token store, a tokenizer file or a checkpoint cannot be used."""

    exit_code = 3


class DivergedError(Gpt2JaxError):
    """Training produced a loss or gradient that is not finite."""

    exit_code = 4
