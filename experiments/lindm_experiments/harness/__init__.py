"""The harness that runs experiments, decides claims and writes reports. It contains no science."""
