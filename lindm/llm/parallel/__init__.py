"""Devices and processes: meshes, shardings, several processes, the supervisor, chips."""
