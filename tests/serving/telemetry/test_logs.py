from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator

import pytest

from chameleon_jax.serving.telemetry import logs
from chameleon_jax.serving.telemetry.logs import LogWriter, setup_logging

ACCESS = logging.getLogger("chameleon_jax.access")
FIELDS = {
    "request_id": "cmpl-1",
    "method": "POST",
    "path": "/v1/completions",
    "status": 200,
    "seconds": 0.25,
    "model": "a0",
    "prompt_tokens": 3,
    "completion_tokens": 4,
}


class SlowStream(io.StringIO):
    """Stream that blocks writers until `go` is set. `entered` is set by the first write."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.go.wait(30)
        return super().write(text)


@pytest.fixture
def handlers() -> Iterator[list[logging.Handler]]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield before[0]
    assert (root.handlers, root.level) == before


def written(format: str, level: str = "INFO") -> tuple[io.StringIO, LogWriter]:
    stream = io.StringIO()
    return stream, setup_logging(format, level, stream)


def test_json_has_one_object_a_line_with_all_that_was_given(handlers):
    stream, writer = written("json")
    ACCESS.info("request", extra=FIELDS)
    ACCESS.warning("line\nbreak %s", "\x1b[31m\u2028")
    writer.close()
    first, second = (json.loads(line) for line in stream.getvalue().split("\n")[:-1])
    assert FIELDS.items() <= first.items()
    assert {"level": "INFO", "logger": "chameleon_jax.access", "message": "request"}.items() <= first.items()
    assert second["message"] == "line\nbreak \x1b[31m\u2028"
    assert first["time"].endswith("+00:00")


def test_json_puts_a_traceback_into_its_record(handlers):
    stream, writer = written("json")
    try:
        raise ValueError("what went\nwrong")
    except ValueError:
        logging.getLogger("chameleon_jax").exception("failed")
    writer.close()
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == "failed"
    assert record["exc_info"].startswith("Traceback") and record["exc_info"].endswith("ValueError: what went\nwrong")


def test_text_has_the_fields_behind_the_message(handlers):
    stream, writer = written("text")
    ACCESS.info("request", extra={"request_id": "cmpl-1", "path": "/a b", "model": None})
    writer.close()
    assert stream.getvalue().endswith(" INFO chameleon_jax.access: request request_id=cmpl-1 path='/a b'\n")


def test_text_of_a_client_cannot_look_like_a_record(handlers):
    stream, writer = written("text")
    forged = "x\n2026-01-01 00:00:00.000 INFO chameleon_jax.access: forged\r\x1b[2J\x85\u2028"
    ACCESS.info("%s", forged, extra={"path": forged})
    try:
        raise ValueError(forged)
    except ValueError:
        ACCESS.exception("failed")
    writer.close()
    lines = stream.getvalue().split("\n")[:-1]
    assert len([line for line in lines if not line.startswith(" ")]) == 2
    assert all(line.isprintable() for line in lines)


def test_levels(handlers):
    stream, writer = written("text", "WARNING")
    ACCESS.info("no")
    ACCESS.warning("yes")
    writer.close()
    assert "yes" in stream.getvalue() and "no\n" not in stream.getvalue()


@pytest.mark.parametrize(
    "settings, field", [({"format": "xml"}, "log_format is 'xml'"), ({"level": "loud"}, "log_level is 'loud'")]
)
def test_wrong_settings(handlers, settings, field):
    with pytest.raises(ValueError, match=f"{field}; allowed: "):
        setup_logging(**settings)


def test_a_stuck_stream_blocks_no_caller(handlers):
    stream = SlowStream()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.TextFormatter())
    writer = LogWriter(handler, "INFO", max_queued=10)
    ACCESS.info("first")
    assert stream.entered.wait(30)
    for i in range(25):
        ACCESS.info("record %d", i)
    assert writer.num_dropped == 15
    stream.go.set()
    writer.close(timeout=30)
    lines = stream.getvalue().splitlines()
    assert [line.split(": ")[1] for line in lines if " INFO " in line] == ["first", *(f"record {i}" for i in range(10))]
    assert [line.split(": ")[1] for line in lines if " WARNING " in line] == ["15 log records were dropped"]


def test_closing_does_not_wait_for_a_stuck_stream(handlers):
    stream = SlowStream()
    writer = LogWriter(logging.StreamHandler(stream), "INFO")
    ACCESS.info("first")
    writer.close(timeout=0.01)
    stream.go.set()


def test_arguments_are_read_at_once(handlers):
    stream = SlowStream()
    writer = LogWriter(logging.StreamHandler(stream), "INFO")
    values = [1]
    ACCESS.info("%s", values)
    values.append(2)
    stream.go.set()
    writer.close(timeout=30)
    assert stream.getvalue() == "[1]\n"
