"""An archive's assets and frames: list, probe, read."""
