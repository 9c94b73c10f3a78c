"""Models from a config and a checkpoint, and what they predict."""
