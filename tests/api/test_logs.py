from __future__ import annotations

import io
import json
import logging

import pytest

from computron.api import exchange
from computron.api.logs import set_up_logging


@pytest.fixture
def lines():
    """Turns logging on in the asked format and gives what was written."""
    root, ours = logging.getLogger(), logging.getLogger("computron")
    before = root.handlers[:], root.level, ours.level
    stream = io.StringIO()

    def start(form, level="info"):
        set_up_logging(level, form, stream)

        def written():
            root.handlers[0].flush()
            return stream.getvalue().splitlines()

        return written

    yield start
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def test_text_lines_have_the_fields_of_the_format_quoted_where_needed(lines):
    written = lines("text")
    logging.getLogger("computron.node").info("swap_in model=%s bytes=%d error=%s", "a", 3, 'no "such" thing')
    (line,) = written()
    assert line.endswith('Z INFO computron.node: swap_in model=a bytes=3 error="no \\"such\\" thing"')


def test_json_lines_keep_the_types_of_fields(lines):
    written = lines("json")
    logging.getLogger("computron.node").info("swap_in model=%s bytes=%d", "a", 3)
    entry = json.loads(written()[0])
    assert entry.pop("time").endswith("Z")
    assert entry == {"level": "info", "logger": "computron.node", "event": "swap_in", "model": "a", "bytes": 3}


def test_other_messages_stay_as_they_are(lines):
    written = lines("json")
    log = logging.getLogger("computron.x")
    log.warning("half of model=%s", "a")
    log.warning("plain = text")
    assert [json.loads(line)["event"] for line in written()] == ["half of model=a", "plain = text"]


async def test_lines_carry_the_id_of_the_request_they_belong_to(lines):
    written = lines("text")
    exchange.begin("r1")
    logging.getLogger("computron.x").info("step")
    logging.getLogger("computron.x").info("step", extra={"request_id": "r2"})
    assert [line.rpartition(" ")[2] for line in written()] == ["request_id=r1", "request_id=r2"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_tracebacks_are_kept(lines, form):
    written = lines(form)
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("computron.x").exception("failed model=%s", "a")
    assert "ValueError: boom" in "\n".join(written())


def test_the_level_is_ours_alone(lines):
    written = lines("text", "debug")
    logging.getLogger("computron.x").debug("ours")
    logging.getLogger("library").info("theirs")
    assert len(written()) == 1


async def test_lines_of_a_busy_loop_are_written_together_and_warnings_at_once(lines, monkeypatch):
    written: list[str] = []
    lines("text")
    handler = logging.getLogger().handlers[0]
    monkeypatch.setattr(handler.stream, "write", written.append)
    log = logging.getLogger("computron.x")
    log.info("one")
    log.info("two")
    assert not written
    log.warning("three")
    assert [line.count("\n") for line in written] == [3]


def test_lines_of_other_threads_are_written_at_once(lines, monkeypatch):
    written: list[str] = []
    lines("text")
    monkeypatch.setattr(logging.getLogger().handlers[0].stream, "write", written.append)
    logging.getLogger("computron.x").info("one")
    assert len(written) == 1
