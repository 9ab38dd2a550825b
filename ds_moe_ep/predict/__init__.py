"""Predicts memory, time and throughput of a plan on named or measured hardware, by arithmetic.

Nothing here imports torch; the formulae and where they come from are in docs/planning.md.
"""
