"""GPT-2 as a Flax Linen module."""
