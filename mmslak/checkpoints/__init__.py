"""Checkpoints: any known file in, clean files out, nothing half-loaded and no code run."""
