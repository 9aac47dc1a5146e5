"""Weights in other programs' formats."""
