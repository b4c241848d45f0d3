"""Run a training script as one of two processes, with the variables that torchrun would set.

Arguments: rank, port of the first process, minutes of DEQ_TIMEOUT, the script, its arguments.
"""

import os
import runpy
import sys

from lib.runs.processes import TIMEOUT

if __name__ == "__main__":
    rank, port, minutes, *sys.argv = sys.argv[1:]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    os.environ.update({**where, "RANK": rank, "LOCAL_RANK": rank, TIMEOUT: minutes})
    runpy.run_path(sys.argv[0], run_name="__main__")
