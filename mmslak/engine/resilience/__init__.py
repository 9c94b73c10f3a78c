"""Hooks by which a run survives kills, full disks, bad samples and non-finite numbers."""
