"""One of several processes: runs a module or a file as the program, and leaves without Python's shutdown.

python -m tests.rank MODULE|FILE.py [ARGUMENTS]

Gloo's threads free tensors some time after a result is there, and need the interpreter's lock for it. PyTorch (2.13)
keeps the group, and so these threads, once DDP, FSDP or a mesh has had it. A thread that asks for the lock while Python
shuts down ends the process: "terminate called without an active exception", one run in twenty on a busy machine.
"""

import os
import runpy
import sys
import traceback


def run(program):
    """Run it; return its exit status."""
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    status = run(sys.argv[0])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
