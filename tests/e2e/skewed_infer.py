"""faulty_infer.py on hosts of which one, named by the variable SKEWED, is an hour ahead.

libfaketime, named by FAKETIME_LIBRARY, shifts the clock that people set, as on a host that is set
wrongly; the one that counts from the start of a machine goes on as it does.
"""

import os
import runpy
import sys
import time
from pathlib import Path

_IS_SKEWED = os.uname().nodename == os.environ["SKEWED"]

if __name__ == "__main__":
    if _IS_SKEWED and "FAKETIME" not in os.environ:
        os.environ.update(
            FAKETIME="+3600",
            FAKETIME_DONT_FAKE_MONOTONIC="1",
            LD_PRELOAD=os.environ["FAKETIME_LIBRARY"],
        )
        os.execv(sys.executable, [sys.executable, "-u", *sys.argv])
    clock = Path(os.environ["FAULT_MARK"]).with_name(f"clock-{os.environ['RANK']}")
    clock.write_text(str(time.time()))
    runpy.run_path(str(Path(__file__).with_name("faulty_infer.py")), run_name="__main__")
