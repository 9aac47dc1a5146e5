"""The outermost frame of a command: what is raised becomes one line on stderr and an exit code."""

import os
import sys
from collections.abc import Callable

from gpt2_jax.errors import Gpt2JaxError, PreemptedError

INTERRUPTED = 130
BROKEN_PIPE = 141


def guarded(program: str, body: Callable[[], int], interrupted: str = "") -> int:
    """Runs `body` and returns its exit code, or that of what it raised; `interrupted` is told after Ctrl-C."""
    try:
        code = body()
        sys.stdout.flush()  # so that a closed pipe shows here
        return code
    except PreemptedError as told:  # no error
        _tell(program, str(told))
        return told.exit_code
    except Gpt2JaxError as error:
        _tell(program, f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        if interrupted:
            _tell(program, interrupted)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, say) has what it wanted; the interpreter flushes stdout once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:  # a full disk, say
        _tell(program, f"error: {error}")
        return Gpt2JaxError.exit_code


def _tell(program: str, message: str) -> None:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
