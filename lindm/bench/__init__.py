"""Benchmarks behind `lindm bench`: each measures lindm beside another implementation."""
