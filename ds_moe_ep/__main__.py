"""Lets `python -m ds_moe_ep` do what `ds-moe-ep` does."""

import sys

from ds_moe_ep.cli import main

sys.exit(main())
