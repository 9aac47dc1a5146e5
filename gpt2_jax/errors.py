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


class DamagedError(DataError):
    """What lies in a saved step is not what was written."""


class DivergedError(Gpt2JaxError):
    """Training produced a loss or gradient that is not finite."""

    exit_code = 4


class PreemptedError(Gpt2JaxError):
    """SIGTERM asked for room; the state is saved, and the same command goes on from it (75 is EX_TEMPFAIL)."""

    exit_code = 75


class InterruptedRunError(PreemptedError):
    """Ctrl-C, with the state saved (130 is that of a shell for a program that SIGINT ended)."""

    exit_code = 130


class OtherHostError(Gpt2JaxError):
    """Another process of the run has failed, with the exit code that is given."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
