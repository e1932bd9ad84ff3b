"""The example that trains a language model, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train_language_model.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=240)


def losses(output: str) -> list[str]:
    return re.findall(r"^step +\d+  loss ([\d.]+)", output, re.MULTILINE)


def digest(output: str) -> str:
    return re.findall(r"^parameters: sha256 (\w+)$", output, re.MULTILINE)[0]


def test_workers_on_the_service_learn_bit_for_bit_what_one_process_does() -> None:
    plain = run("--plain", "--steps", "4")
    assert plain.returncode == 0, plain.stderr
    first, last = losses(plain.stdout)
    assert float(last) < float(first) - 0.1
    shared = run("--steps", "4")
    assert shared.returncode == 0, shared.stderr
    assert "snapshot" not in shared.stderr
    assert losses(shared.stdout) == [first, last]
    assert digest(shared.stdout) == digest(plain.stdout)


def test_a_worker_that_fails_ends_all_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("To be, or not to be")
    ended = run("--steps", "4", "--text", str(tmp_path / "short.txt"))
    assert ended.returncode == 1
    assert "short.txt is too short: give at least 5120 bytes" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workers", "0"), "--workers: 0 is less than 1"),
        (("--text", "/nowhere"), "--text: there is no file /nowhere"),
        (("--text", "/"), "--text: there is no file /"),
    ],
)
def test_what_is_asked_wrongly_is_told_before_anything_is_started(arguments: tuple[str, ...], words: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.endswith(f"{words}\n")
