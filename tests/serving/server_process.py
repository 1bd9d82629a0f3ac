"""Server processes, forked by `tests.serving.forking`, one at a time."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

TIMEOUT = 120
ENGINE = ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "1", "--max-num-batched-tokens", "32"]
ENGINE += ["--max-lora-rank", "8", "--num-pages", "200", "--compile-programs", "lazy"]


class Process:
    """Server process, and its output so far."""

    def __init__(self, parent: subprocess.Popen[str], log: Path, arguments: list[str], code: str):
        assert parent.stdin is not None and parent.stdout is not None
        self._parent = parent
        os.mkfifo(log)
        print(json.dumps([arguments, str(log), code]), file=parent.stdin, flush=True)
        self._pid = int(parent.stdout.readline())
        self._code: int | None = None
        self.log = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(log,))
        self._reader.start()

    def _read(self, log: Path) -> None:
        with log.open() as lines:
            for line in lines:
                self.log += line
                if "control-C stops it" in line:
                    self._ready.set()
        self._ready.set()

    def wait(self) -> str:
        """Wait until the server runs. Returns its address for HTTP."""
        assert self._ready.wait(TIMEOUT), self.log
        url = re.search(r"http://127\.0\.0\.1:\d+", self.log)
        assert url is not None, self.log
        return url[0]

    def send(self, number: signal.Signals) -> None:
        assert self._code is None
        os.kill(self._pid, number)

    def ended(self) -> int:
        if self._code is None:
            self._reader.join(TIMEOUT)
            assert not self._reader.is_alive() and self._parent.stdout is not None, self.log
            self._code = int(self._parent.stdout.readline())
        return self._code

    def kill(self) -> None:
        if self._code is None:
            self.send(signal.SIGKILL)
            self.ended()


class Serve(Protocol):
    def __call__(
        self, model: Path, adapter_dir: Path, *options: str, code: str = ""
    ) -> contextlib.AbstractContextManager[Process]: ...


@contextlib.contextmanager
def servers(logs: Path) -> Iterator[Serve]:
    """Serve in a process of its own, until the end of each context. Args: logs: Directory for the logs of all."""
    numbers = itertools.count()
    command = [sys.executable, "-m", "tests.serving.forking"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:

        @contextlib.contextmanager
        def serve(model: Path, adapter_dir: Path, *options: str, code: str = "") -> Iterator[Process]:
            arguments = ["serve", str(model), "--adapter-dir", str(adapter_dir), *ENGINE, *options]
            process = Process(parent, logs / str(next(numbers)), arguments, code)
            try:
                yield process
            finally:
                process.kill()

        yield serve
