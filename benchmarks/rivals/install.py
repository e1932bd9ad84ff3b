"""Makes an environment for each rival under build/rivals, from its requirements.txt.

    python benchmarks/rivals/install.py [RIVAL ...]

Each sees the packages of the environment that runs this (the project's own, with its test extra) behind its own ones,
through a .pth file: torch is the same everywhere, and nothing large is fetched twice. A rival that cannot be installed
gets its reason written beside the environment, and bench_rivals shows it in place of figures. Needs 2.7 GB of disk.
"""

from __future__ import annotations

import argparse
import shutil
import site
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ENVIRONMENTS = FOLDER.parents[1] / "build" / "rivals"
LIMIT_SECONDS = 300


def rivals() -> list[str]:
    return sorted(file.parent.name for file in FOLDER.glob("*/requirements.txt"))


def python_of(rival: str) -> Path:
    return ENVIRONMENTS / rival / "bin" / "python"


def reason_of(rival: str) -> str | None:
    """Why the rival cannot run here; None if it can."""
    file = _reason_file(rival)
    if file.exists():
        return f"does not install here: {file.read_text().strip()}"
    if not python_of(rival).exists():
        return "is not installed: run benchmarks/rivals/install.py"
    return None


def install(rival: str) -> str | None:
    """What failed, in pip's words; None if the rival can run now."""
    environment = ENVIRONMENTS / rival
    shutil.rmtree(environment, ignore_errors=True)
    _reason_file(rival).unlink(missing_ok=True)
    failed = _run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    if failed:
        return failed
    packages = subprocess.check_output(
        [str(python_of(rival)), "-c", "import site; print(site.getsitepackages()[0])"], text=True
    )
    Path(packages.strip(), "project.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python_of(rival)), "install"]
    failed = _run(*command, "--quiet", "--no-deps", "--requirement", str(FOLDER / rival / "requirements.txt"))
    if failed:
        ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
        _reason_file(rival).write_text(failed + "\n")
    return failed


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"more than {LIMIT_SECONDS} s"
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None


def _reason_file(rival: str) -> Path:
    return ENVIRONMENTS / f"{rival}.reason"


def main() -> None:
    known = rivals()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rivals", nargs="*", metavar="RIVAL", help=f"default: {' '.join(known)}")
    for rival in parser.parse_args().rivals or known:
        if rival not in known:
            parser.error(f"{rival} is none of {', '.join(known)}")
        print(f"{rival}: {install(rival) or 'installed'}", flush=True)


if __name__ == "__main__":
    main()
