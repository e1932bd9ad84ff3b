from __future__ import annotations

import http.server
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from computron import cli
from computron.api.version import installed_version
from computron.cli import serving
from computron.config import Config, ModelConfig
from computron.errors import ConfigError

MODEL = {
    "id": "a/b", "task": "generate", "state": "resident", "bytes": 3 << 20, "resident_ratio": 1.0, "pinned": True,
    "queue_depth": 2, "running": 1,
}  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as a server with one model, which becomes resident at the second look."""

    seen: ClassVar[list[tuple[str, str, str | None]]] = []
    ratio: ClassVar[list[float]] = []

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(200, {"data": [MODEL]})
        else:
            self.reply(200, MODEL | {"resident_ratio": self.ratio.pop(0)})

    def do_POST(self) -> None:
        if "nothing" in self.path:
            self.reply(404, {"error": {"message": "The model `nothing` does not exist."}})
        elif "locked" in self.path:
            self.reply(401, {"error": {"message": "the API key is missing or wrong"}})
        else:
            self.reply(202, MODEL | {"resident_ratio": self.ratio.pop(0)})

    def reply(self, status: int, body: Any) -> None:
        self.seen.append((self.command, self.path, self.headers["Authorization"]))
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url():
    Handler.seen, Handler.ratio = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def run(*arguments: str):
    return CliRunner().invoke(cli.app, arguments)


def test_help_names_the_commands():
    text = run("--help").output
    assert all(command in text for command in ("serve", "models", "version"))


@pytest.mark.parametrize("command", [("serve",), ("models", "list"), ("models", "load"), ("models", "unload")])
def test_help_has_examples(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "computron " + " ".join(command) in result.output


@pytest.mark.parametrize("asked", ["version", "--version"])
def test_version(asked):
    result = run(asked)
    assert result.exit_code == 0
    assert result.output == f"computron {installed_version()}\n"


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_models_are_listed(url, scheme):
    result = run("models", "list", "--url", scheme + url.removeprefix("http://"))
    assert result.exit_code == 0
    assert result.output.splitlines()[1].split() == [
        "a/b", "(pinned)", "generate", "resident", "3.0", "MiB", "100%", "2", "1",
    ]  # fmt: skip


def test_load_waits_until_the_model_is_resident(url):
    Handler.ratio += [0.0, 0.5, 1.0]
    result = run("models", "load", "a/b", "--url", url, "--api-key", "k")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "a/b is on the device")
    assert Handler.seen == [
        ("POST", "/v1/models/a/b/load", "Bearer k"),
        ("GET", "/v1/models/a/b", "Bearer k"),
        ("GET", "/v1/models/a/b", "Bearer k"),
    ]


def test_load_that_takes_too_long_fails_and_says_so(url):
    Handler.ratio += [0.5]
    result = run("models", "load", "a/b", "--url", url, "--wait", "0")
    assert result.exit_code == 1
    assert "a/b is 50% on the device after 0 s" in result.stderr


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(0.0, "a/b is off the device"), (0.5, "a/b will leave the device as soon as it is idle")],
)
def test_unload_tells_what_is_left(url, ratio, said):
    Handler.ratio += [ratio]
    assert run("models", "unload", "a/b", "--url", url).output.strip() == said


def test_the_servers_own_words_are_shown(url):
    result = run("models", "load", "nothing", "--url", url)
    assert result.exit_code == 1
    assert result.stderr == "error: The model `nothing` does not exist.\n"


@pytest.mark.parametrize(("key", "which"), [((), "an API key"), (("--api-key", "k"), "another API key")])
def test_a_missing_or_wrong_key_is_told_with_where_to_give_it(url, key, which):
    result = run("models", "load", "locked", "--url", url, *key)
    assert result.exit_code == 1
    assert result.stderr == f"error: {url} asks for {which}; give it with --api-key or COMPUTRON_API_KEY\n"


def test_no_server_is_one_line_with_the_remedy():
    result = run("models", "list", "--url", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no server at http://127.0.0.1:1: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "called", "hint"),
    [
        ("/here", "/here/computron", "`computron serve`"),
        ("/else", "/here/computron", "`/here/computron serve`"),
        ("/else", "/here/__main__.py", f"`{sys.executable} -m computron serve`"),
    ],
)
def test_the_hint_can_be_typed_as_it_stands(path, called, hint, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"{path}/{name}" if path == "/here" else None)
    monkeypatch.setattr("sys.argv", [called])
    assert hint in run("models", "list", "--url", "127.0.0.1:1").stderr


def test_a_wrong_configuration_is_one_line(tmp_path: Path):
    path = tmp_path / "serve.toml"
    path.write_text('[device]\nmemroy = "1GiB"\n')
    result = run("serve", str(path))
    assert result.exit_code == 1
    assert result.stderr == f'error: {path}:2: unknown key "memroy" in [device]; did you mean "memory"?\n'


def test_an_error_at_the_start_finds_its_line(tmp_path: Path, monkeypatch):
    path = tmp_path / "serve.toml"
    path.write_text('[[models]]\nid = "a"\nsource = "org/a"\n[device]\nmemory = "1MiB"\n')

    def run_server(config):
        raise ConfigError("device.memory is too small", param="device.memory")

    monkeypatch.setattr(serving, "_run_server", run_server)
    result = run("serve", str(path))
    assert (result.exit_code, result.stderr) == (1, f"error: {path}:5: device.memory is too small\n")


@pytest.mark.parametrize(("models", "said"), [(("a",), "1 model "), (("a", "b"), "2 models "), ((), "0 models ")])
def test_what_is_loaded_is_counted(models, said, capsys):
    display = serving.LoadingDisplay(Config(models=tuple(ModelConfig(id=name) for name in models)))
    display.ready("http://here")
    assert capsys.readouterr().err.startswith(said)


def test_a_server_says_what_it_serves_and_last_of_all_that_it_has_stopped(tmp_path: Path):
    path = tmp_path / "serve.toml"
    path.write_text(
        '[server]\nport = 0\n[device]\nkind = "host"\nmemory = "1MiB"\n[host]\nmemory = "1MiB"\n'
        '[[models]]\nid = "echo"\ntask = "custom"\n'
        'factory = "examples.echo:make"\nbatch_manager = "examples.echo:EchoBatches"\n'
    )
    command = [sys.executable, "-m", "computron", "serve", str(path)]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("1 model (0 MiB) loaded in ")
        process.send_signal(signal.SIGTERM)
        *log, last = process.stdout.read().splitlines()
    assert (process.returncode, last) == (0, "stopped")
    assert "shutdown signal=SIGTERM" in log[-1]


def test_a_wrong_option_is_a_usage_error(tmp_path: Path):
    assert run("serve", "x.toml", "--port", "70000").exit_code == 2
    assert run("serve").exit_code == 2


def test_options_win_over_the_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "serve.toml"
    path.write_text('[server]\nport = 1\nhost = "h"\n[[models]]\nid = "a"\nsource = "org/a"\n')
    seen = []

    def run_server(config):
        seen.append(config.server)
        return 15

    monkeypatch.setattr(serving, "_run_server", run_server)
    assert run("serve", str(path), "--port", "9", "--log-level", "debug").exit_code == 0
    assert (seen[0].host, seen[0].port, seen[0].log_level) == ("h", 9, "debug")
