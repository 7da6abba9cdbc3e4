"""Input and output: files, directories and locks, signals, manifests, progress, tables."""
