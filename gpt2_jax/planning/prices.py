"""What a chip costs per hour: a table that the user edits.

`gpt2-jax plan --print_prices > prices.toml` writes it out, `--prices=prices.toml` takes it back.
"""

import math
import tomllib

from gpt2_jax.errors import UsageError
from gpt2_jax.planning.chips import CHIPS
from gpt2_jax.user_paths import expand_user

# Dollars per chip and hour.
PRICES: dict[str, float] = {"v4": 3.22, "v5e": 1.20, "v5p": 4.20, "v6e": 2.70}
SOURCE = (
    "rough on-demand prices in the United States in 2025, not checked against today's list "
    "(cloud.google.com/tpu/pricing); few pay them: edit them"
)


def read_prices(path: str) -> tuple[dict[str, float], str]:
    """Dollars per chip-hour by chip, and where they are from; an empty path stands for the package's own.

    Raises:
      UsageError: no file, no TOML, an unknown chip, or no price.
    """
    if not path:
        return PRICES, SOURCE
    file = expand_user(path)
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"--prices={path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--prices={path} is no TOML: {error}; --print_prices shows how it is written") from None
    for chip, price in table.items():
        if chip not in CHIPS:
            raise UsageError(f"--prices={path}: unknown chip {chip!r}; known: {', '.join(CHIPS)}")
        if type(price) not in (int, float) or not math.isfinite(price) or price < 0:
            raise UsageError(
                f"--prices={path}: {chip} = {price!r}; give dollars per chip and hour, as in {chip} = 1.20"
            )
    return {chip: float(price) for chip, price in table.items()}, path


def prices_as_toml() -> str:
    """The package's own table, to be edited."""
    lines = [f"# Dollars per chip and hour: {SOURCE}."]
    lines += [f"{chip} = {PRICES[chip]:.2f}" if chip in PRICES else f"# {chip} = " for chip in CHIPS]
    return "\n".join(lines) + "\n"
