"""Measures ds_moe_ep, mostly against its peers, and writes its tables into docs/.

Use: python launch/bench.py TABLE (--help: the tables)
"""

import os
import sys
from pathlib import Path

from ds_moe_ep.rehearsal.guard import go_on_guarded


def main() -> int:
    """Writes a table, or is one of its ranks; returns the exit code."""
    argv, work = sys.argv[1:], None
    if not any(word.startswith("--result=") for word in argv):  # ranks stay below the guard
        try:
            work = go_on_guarded("ds-moe-ep-bench-")
        except KeyboardInterrupt:
            return 130
    # After the guard's fork: CUDA cannot be used in a fork of a process that has asked for it, as
    # DeepSpeed does when it is imported.
    from ds_moe_ep.bench import command

    return command.main(Path(__file__).resolve(), argv, work)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: see _leave in ds_moe_ep/engine/supervisor.py.
    os._exit(code)
