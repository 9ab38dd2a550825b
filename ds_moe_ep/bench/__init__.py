"""Benchmarks against what a user would pick instead: both sides in turn in one job."""
