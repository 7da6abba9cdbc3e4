"""Files on disk: atomic writes, directories, locks, signals, manifests, progress."""
