"""A package, so that child processes find it before a library's folder of the same name."""
