"""The files that `ds-moe-ep config` and `ds-moe-ep balance` write, and reading them back.

Each module owns one format, Megatron's three (megatron*.py) share one; bundle.py puts the files of
a run into a folder, and strict.py reads JSON, for other packages too.
"""
