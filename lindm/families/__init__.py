"""Named problems and random families of problems, and the registry that finds them by name."""
