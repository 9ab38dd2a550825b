"""Hosts of a hostfile on one machine, and jobs tried on them before they are run for real."""

__all__: list[str] = []
