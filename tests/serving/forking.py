"""Parent of servers: imports what each needs, 4 of its 6 processor seconds, and forks one at a time.

Each line of its input is JSON: the arguments of `chameleon-jax`, the file for the log, and code that runs first. It prints the
server's process id, and later its exit code.
"""

from __future__ import annotations

import json
import os
import sys

import uvloop  # noqa: F401

from chameleon_jax.serving import async_llm, server  # noqa: F401
from chameleon_jax.serving.cli import app


def main() -> None:
    for line in sys.stdin:
        arguments, log, code = json.loads(line)
        child = os.fork()
        if child == 0:
            break
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    os.dup2(os.open(log, os.O_WRONLY), sys.stderr.fileno())
    exec(code, {})
    sys.argv = ["chameleon-jax", *arguments]
    app()


main()
