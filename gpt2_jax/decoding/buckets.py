"""Sizes that repeat, so that work which varies a little in size shares its compiled programs."""


def bucket(size: int, smallest: int = 1) -> int:
    """The next power of two from `size` up, 1 or more."""
    return max(smallest, 1 << (size - 1).bit_length())
