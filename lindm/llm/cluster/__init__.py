"""Clusters: job scripts, Ray, and plans of memory and time for hardware that is not present."""
