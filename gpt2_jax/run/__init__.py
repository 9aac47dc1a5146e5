"""The world around the pure parts: run folders, checkpoints, metrics, the loop and the wiring."""
