"""A `computron serve` process, and a workload sent to it open-loop: each request when it is due, not as others end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from _processes import HOST, free_port, wait_until_ready

from computron.profiling.questions import Question
from computron.profiling.server import Answer, Server
from computron.simulation.workload import Arrival, Workload

ROOT = Path(__file__).parents[1]
START_SECONDS = 120.0
END_SECONDS = 30.0


@dataclass(frozen=True)
class Replay:
    """Of each request, in their order: seconds from when it was sent until its first token, and until its end.

    sent: the workload with the times at which its requests were really sent.
    """

    first: list[float]
    last: list[float]
    sent: Workload


@contextlib.contextmanager
def computron_serve(config: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Its address, once it is ready; it ends with the block. Raises RuntimeError, with its last words."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        path = Path(folder) / "serve.toml"
        path.write_text(config)
        command = [sys.executable, "-m", "computron", "serve", str(path), "--port", str(port)]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        )

        def require_alive() -> None:
            if process.poll() is not None:
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines()
                raise RuntimeError(f"computron serve ended at once: {(lines or ['without a word'])[-1]}")

        try:
            wait_until_ready(f"http://{HOST}:{port}/health/ready", START_SECONDS, require_alive)
            yield f"http://{HOST}:{port}"
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def replay(server: Server, workload: Workload, questions: Mapping[Arrival, Question]) -> Replay:
    """Send every request when it is due. Raises CannotProfile if one is not answered."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    sent: list[Arrival] = []
    asked: list[asyncio.Task[Answer]] = []
    for arrival in workload.arrivals:
        wait = began + arrival.time - loop.time()
        if wait > 0:
            await asyncio.sleep(wait)
        sent.append(arrival._replace(time=loop.time() - began))
        asked.append(loop.create_task(server.ask(questions[arrival])))
    answers = await asyncio.gather(*asked)
    return Replay(
        [answer.first for answer in answers],
        [answer.last for answer in answers],
        replace(workload, arrivals=tuple(sent)),
    )
