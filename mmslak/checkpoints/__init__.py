"""Checkpoints: any known file is read, without running its code; clean files are written."""
