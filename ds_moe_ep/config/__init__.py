"""Every file that `ds-moe-ep config` writes, and reading the configuration of a run back.

Each module here owns one format; bundle.py puts the files into a folder.
"""
