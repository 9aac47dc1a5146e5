"""Which part of a corpus is kept for evaluation: the same part whatever the number of workers."""

import dataclasses
import fractions
import hashlib

from gpt2_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class HeldOutSplit:
    """Holds out the share `fraction` of `num_documents` documents.

    Of two or more documents: one from each stratum of about 1/fraction consecutive documents, chosen by a
    hash of the stratum's number, so that the held-out part looks like the whole even where the order has a
    structure. A single document is cut: its tail is held out.
    """

    fraction: float
    num_documents: int

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UsageError(f"held_out={self.fraction}: the share held out must lie between 0 and 1, both excluded")

    def is_held_out(self, document: int) -> bool:
        """Whether the document of this number is held out; there are two documents or more."""
        above, below = self._ratio
        stratum = document * above // below
        start = -(-stratum * below // above)
        size = -(-(stratum + 1) * below // above) - start
        if stratum == 0:  # at least one document is held out; size >= 2 leaves at least one
            size = min(size, self.num_documents)
        digest = hashlib.blake2b(stratum.to_bytes(8, "little"), digest_size=8).digest()
        return document - start == int.from_bytes(digest, "little") % size

    def cut(self, num_characters: int) -> int:
        """Characters of a single document that are for training; the rest is held out."""
        above, below = self._ratio
        return num_characters * (below - above) // below

    @property
    def _ratio(self) -> tuple[int, int]:
        # The decimal number that was meant, not its binary neighbour: 1 - 0.9 is not 0.1 in floating point.
        return fractions.Fraction(str(self.fraction)).as_integer_ratio()
