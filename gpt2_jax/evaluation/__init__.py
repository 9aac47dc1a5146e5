"""Measuring a model. An evaluation returns named numbers; the loop knows nothing else of it."""
