"""Converts a Hugging Face model to an expert-sharded checkpoint and back: `ds-moe-ep convert`.

Use: python launch/convert.py SRC DST --to ep (--help: the rest)
"""

import sys

from ds_moe_ep.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
