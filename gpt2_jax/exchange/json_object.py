"""Files with one JSON object."""

import json
import pathlib
from typing import Any

from gpt2_jax.errors import DataError


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object. Raises DataError when the file is missing, damaged or something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: not a JSON object; fetch it again")
    return content
