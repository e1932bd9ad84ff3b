"""What does a request cost that computes nothing?

Echo, a custom model without weights, is asked through HTTP. Baseline: a bare aiohttp handler, also on uvloop, that
reads the same JSON and answers with the same JSON, nothing else. Both servers are processes of their own; the load
comes from this one, in turns. `overhead.rps_share` is measured with many connections, `overhead.added_p50_ms` with one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import uvloop
from _common import Report, arguments
from _load import Load, load
from _processes import HOST, free_port, wait_until_ready

NAMES = ("overhead.rps_share", "overhead.added_p50_ms")
ROOT = Path(__file__).parents[1]
PATH = "/v1/models/echo/infer"
BODY = json.dumps({"text": "What is the capital of France?", "numbers": list(range(16))}).encode()
CONFIG = """
[device]
kind = "host"
memory = "16MiB"
[[models]]
id = "echo"
task = "custom"
factory = "examples.echo:make"
batch_manager = "examples.echo:EchoBatches"
max_batch_size = 64
"""
BARE = f"""
import json, time, uuid, uvloop
from aiohttp import web

async def handle(request):
    body = await request.json()
    answer = {{"id": f"infer-{{uuid.uuid4().hex}}", "object": "inference", "created": int(time.time()), "model": "echo",
              "output": body}}
    return web.json_response(answer)

async def health(request):
    return web.Response()

app = web.Application()
app.router.add_post("{PATH}", handle)
app.router.add_get("/health/ready", health)
web.run_app(app, host="{HOST}", port=PORT, loop=uvloop.new_event_loop(), access_log=None, print=None)
"""
START_SECONDS = 60.0


def _require_alive(process: subprocess.Popen[bytes], command: list[str]) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"the server did not start: {' '.join(command[:5])}")


@contextlib.contextmanager
def server(command: list[str], port: int) -> Iterator[int]:
    """Run until the block ends; the port is yielded once the server is ready."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(f"http://{HOST}:{port}/health/ready", START_SECONDS, lambda: _require_alive(process, command))
        yield port
    finally:
        process.terminate()
        process.wait()


def measure(ports: dict[str, int], connections: int, seconds: float, rounds: int) -> dict[str, list[Load]]:
    """Rounds of each server in turn, after one to warm up."""
    loads: dict[str, list[Load]] = {name: [] for name in ports}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for number in range(rounds + 1):
            for name, port in ports.items():
                result = runner.run(load(HOST, port, PATH, BODY, connections, seconds))
                if number:
                    loads[name].append(result)
    return loads


def median(loads: list[Load], figure: str) -> float:
    if figure == "rate":
        return statistics.median(load.rate for load in loads)
    return statistics.median(load.percentile(float(figure)) for load in loads) * 1000


def main() -> None:
    options = arguments(
        __doc__ or "", lambda parser: parser.add_argument("--connections", type=int, default=32, help="default: 32")
    )
    seconds, rounds = (1.0, 3) if options.quick else (3.0, 7)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "echo.toml"
        config.write_text(CONFIG)
        ours, bare = free_port(), free_port()
        computron = [sys.executable, "-m", "computron", "serve", str(config), "--port", str(ours)]
        with (
            server(computron, ours),
            server([sys.executable, "-c", BARE.replace("PORT", str(bare))], bare),
        ):
            ports = {"computron": ours, "bare": bare}
            many = measure(ports, options.connections, seconds, rounds)
            one = measure(ports, 1, seconds, rounds)
    report = Report("Echo through HTTP against a bare aiohttp handler", options, NAMES)
    rate, bare_rate = median(many["computron"], "rate"), median(many["bare"], "rate")
    report.row("overhead.rps_share", rate / bare_rate, "share", 1.0, rate / bare_rate)
    report.row("overhead.rps", rate, "requests/s", bare_rate, rate / bare_rate)
    p50, bare_p50 = median(one["computron"], "0.5"), median(one["bare"], "0.5")
    report.row("overhead.added_p50_ms", p50 - bare_p50, "ms", 0.0, p50 / bare_p50)
    for share in ("0.5", "0.99"):
        value, baseline = median(one["computron"], share), median(one["bare"], share)
        report.row(f"overhead.one_connection.p{float(share) * 100:g}_ms", value, "ms", baseline, value / baseline)
        value, baseline = median(many["computron"], share), median(many["bare"], share)
        report.row(f"overhead.many_connections.p{float(share) * 100:g}_ms", value, "ms", baseline, value / baseline)
    report.plot(lambda axes: draw(axes, many))
    report.finish()


def draw(axes: object, loads: dict[str, list[Load]]) -> None:
    """The distribution of latencies with many connections."""
    for name, results in loads.items():
        latencies = sorted(latency * 1000 for result in results for latency in result.latencies)
        shares = [(index + 1) / len(latencies) for index in range(len(latencies))]
        axes.plot(latencies, shares, label=name)  # type: ignore[attr-defined]
    axes.set_xlabel("latency (ms)")  # type: ignore[attr-defined]
    axes.set_ylabel("share of requests")  # type: ignore[attr-defined]
    axes.set_xscale("log")  # type: ignore[attr-defined]
    axes.legend()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
