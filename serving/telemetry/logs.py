"""Logs: one line for each record, as text or as JSON, written by a thread so that no caller waits for a terminal or a pipe.

The `extra` fields of a record, such as the request's id, are part of the line. Prompts and outputs are never logged.
"""

from __future__ import annotations

import copy
import logging
import logging.handlers
import queue
import sys
import threading
import time
from typing import TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from chameleon_jax.checks import require

FORMATS = ("text", "json")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
MAX_QUEUED = 10_000
"""Records that may wait for the writer. Further ones are dropped and counted."""

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160), 0x2028, 0x2029)} | {
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
}
_BUILT_IN = frozenset((*RESERVED_ATTRS, "taskName", "message", "asctime", "color_message"))  # the last is uvicorn's
_JSON = JsonFormatter(
    "%(levelname)s%(name)s%(message)s",
    rename_fields={"levelname": "level", "name": "logger"},
    reserved_attrs=sorted(_BUILT_IN),
    timestamp="time",
)
"""Formatter of one JSON object a line. Its `time` is in UTC."""


def setup_logging(format: str = "text", level: str = "INFO", stream: TextIO | None = None) -> LogWriter:
    """Send the records of all loggers, from `level` on, to a stream, by default the standard error.

    Run uvicorn with `log_config=None, access_log=False`: `chameleon_jax.access` logs each request already.

    Raises:
        ValueError: The format or the level is unknown.
    """
    require(format in FORMATS, "log_format", format, " or ".join(FORMATS))
    require(level in LEVELS, "log_level", level, ", ".join(LEVELS))
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(_JSON if format == "json" else TextFormatter())
    return LogWriter(handler, level)


class LogWriter:
    """Replaces the root logger's handlers until it is closed."""

    def __init__(self, handler: logging.Handler, level: str, max_queued: int = MAX_QUEUED):
        self._queue: queue.Queue[logging.LogRecord | None] = queue.Queue(max_queued)
        self._entry = _QueueHandler(self._queue)
        self._handler = handler
        root = logging.getLogger()
        self._before = (root.handlers[:], root.level)
        root.handlers[:] = [self._entry]
        root.setLevel(level)
        self._thread = threading.Thread(target=self._write, name="log-writer", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Records lost because the stream is too slow."""
        return self._entry.num_dropped

    def close(self, timeout: float = 2.0) -> None:
        """Write the remaining records and restore the previous handlers. Args: timeout: most seconds for the writing."""
        root = logging.getLogger()
        root.handlers[:], level = self._before
        root.setLevel(level)
        end = time.monotonic() + timeout
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(max(0.0, end - time.monotonic()))

    def _write(self) -> None:
        reported = 0
        while (record := self._queue.get()) is not None:
            self._handler.handle(record)
            dropped = self.num_dropped
            if dropped > reported:
                text = "%d log records were dropped: the stream is too slow"
                values = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "args": (dropped - reported,)}
                self._handler.handle(logging.makeLogRecord({**values, "msg": text}))
                reported = dropped


class TextFormatter(logging.Formatter):
    """Formatter of lines `TIME LEVEL LOGGER: MESSAGE KEY=VALUE...`, in local time.

    Tracebacks are indented and control characters escaped, so that no client can forge a record.
    """

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        extras = "".join(f" {key}={_quoted(str(value))}" for key, value in _extras(record).items())
        text = f"{when}.{int(record.msecs):03d} {record.levelname} {record.name}: {record.getMessage()}{extras}"
        lines = [text.translate(_ESCAPES)]
        trace = record.exc_text or (self.formatException(record.exc_info) if record.exc_info else "")
        lines += ["    " + line.translate(_ESCAPES) for line in trace.splitlines()]
        return "\n".join(lines)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _BUILT_IN and value is not None}


def _quoted(text: str) -> str:
    return repr(text) if not text or any(c.isspace() or c in "='\"" for c in text) else text


class _QueueHandler(logging.handlers.QueueHandler):
    """Handler that drops records instead of waiting for room in the queue."""

    def __init__(self, records: queue.Queue[logging.LogRecord | None]):
        super().__init__(records)
        self.num_dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1  # safe: `handle` holds the handler's lock

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Format a record's arguments, which may change later, and its traceback, whose frames would stay alive."""
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        return record
