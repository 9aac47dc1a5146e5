"""`--config.SECTION.KEY=VALUE` on a command line, taken apart."""

import difflib
from collections.abc import Sequence

from gpt2_jax.errors import UsageError


def parse_overrides(rest: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Values by key, as `config_file.load_config` wants them.

    Args:
      rest: the words that the parser of the other flags left over.
      known: those flags, to say which one may have been meant.

    Raises:
      UsageError: a word that is no override, or one without a value.
    """
    overrides = {}
    words = iter(rest)
    for word in words:
        flag, equals, value = word.partition("=")
        if not flag.startswith("--config."):
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}, --config.SECTION.KEY"
            raise UsageError(f"unknown argument {word!r}; {hint}")
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UsageError(f"{flag} has no value: write {flag}=VALUE")
        overrides[flag.removeprefix("--config.")] = value
    return overrides
