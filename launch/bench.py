"""Measures ds_moe_ep against its peers and writes docs/benchmarks.md.

Use: python launch/bench.py TABLE (--help: the tables)
"""

import os
import sys
from pathlib import Path

from ds_moe_ep.bench.command import main

if __name__ == "__main__":
    code = main(Path(__file__).resolve(), sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: see launch/infer.py.
    os._exit(code)
