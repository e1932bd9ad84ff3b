from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from computron._toml import key_lines
from computron.config import POLICIES, Config, ModelConfig, load_config, with_place
from computron.errors import CheckpointError, ConfigError
from computron.scheduling import policies

MODEL = '[[models]]\nid = "m"\nsource = "org/m"\n'


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "serve.toml"
        path.write_text(text)
        return path

    return write


def complaint(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value).removeprefix(str(path))


def test_every_section_is_read(write):
    config = load_config(
        write(
            """
            [server]
            port = 0
            max_body = "1.5MB"
            keep_alive_interval = "500ms"
            [device]
            kind = "host"
            memory = "300MiB"
            link_bandwidth = "2GB/s"
            link_latency = "10us"
            [host]
            memory = "8GiB"
            spill_directory = "spill"
            [group]
            tensor_parallel = 1
            [scheduler]
            policy = "lru"
            max_wait = "1min"
            [[models]]
            id = "a"
            source = "org/a"
            pinned = true
            [[models]]
            id = "team/b"
            task = "custom"
            factory = "package.module:make"
            arguments = { width = 3 }
            """
        )
    )
    assert (config.server.port, config.server.max_body, config.server.keep_alive_interval) == (0, 1_500_000, 0.5)
    assert (config.device.memory, config.device.link_bandwidth) == (300 << 20, 2e9)
    assert config.device.link_latency == pytest.approx(1e-5)
    assert config.host.memory == 8 << 30
    assert config.host.spill_directory is not None
    assert config.host.spill_directory.is_absolute()
    assert (config.scheduler.policy, config.scheduler.max_wait) == ("lru", 60.0)
    assert [model.id for model in config.models] == ["a", "team/b"]
    assert config.models[0].pinned
    assert config.models[1].arguments == {"width": 3}


def test_absent_sections_have_their_defaults(write):
    config = load_config(write(MODEL))
    assert (config.server, config.device, config.scheduler) == (Config().server, Config().device, Config().scheduler)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[device]\nmemroy = "1GiB"\n', ':2: unknown key "memroy" in [device]; did you mean "memory"?'),
        ('[devcie]\nkind = "host"\n', ':1: unknown table or key "devcie"; did you mean "device"?'),
        ('[device]\nmemory = "300"\n', ':2: memory: "300" has no unit; write it like "300MiB"'),
        ("[device]\nmemory = 300\n", ':2: memory: must be a size with its unit in quotes, like "300MiB", not 300'),
        ('[device]\nmemory = "300mib"\n', ':2: memory: unknown unit "mib" in "300mib"; did you mean "MiB"?'),
        ('[device]\nmemory = "lots"\n', ':2: memory: "lots" is not a size; write it like "300MiB"'),
        ('[device]\nmemory = "0B"\n', ":2: memory: must be more than 0, not 0"),
        ('[device]\nlink_bandwidth = "2GB"\n', ':2: link_bandwidth: unknown unit "GB" in "2GB"; did you mean "GB/s"?'),
        ('[device]\nkind = "gpu"\n', ':2: kind: "gpu" is not allowed; choose from auto, cuda, host'),
        ('[device]\nkind = "host"\n', ':1: kind = "host" needs the memory to serve from, like memory = "2GiB"'),
        (
            '[device]\nkind = "cuda"\nlink_bandwidth = "2GB/s"\n',
            ':3: link_bandwidth belongs to kind = "host", which emulates a link',
        ),
        ('[device]\npage_size = "3MiB"\n', ":2: page_size: 3145728 bytes is not a power of two"),
        ('[device]\nverify = "yes"\n', ":2: verify: must be true or false, not a string"),
        ("[server]\nport = 70000\n", ":2: port: must be at most 65535, not 70000"),
        ("[server]\nport = true\n", ":2: port: must be a whole number, not true or false"),
        ('[server]\nlog_level = "warn"\n', ':2: log_level: "warn" is not allowed; did you mean "warning"?'),
        ('[scheduler]\nmax_wait = "30"\n', ':2: max_wait: "30" has no unit; write it like "30s"'),
        ('[scheduler]\npolicy = "lur"\n', ':2: unknown policy "lur"; did you mean "lru"?'),
        ("[group]\ntensor_parallel = 0\n", ":2: tensor_parallel: must be at least 1, not 0"),
        ('[group]\nnode_timeout = "0s"\n', ":2: node_timeout: must be more than 0, not 0"),
        ("server = 3\n", ":1: [server] must be a table, not a whole number"),
        ("[device]\nmemory = 3GiB\n", ":2: Expected newline or end of document after a statement at column 11"),
    ],
)
def test_a_wrong_setting_is_named_with_its_line_and_the_remedy(write, text, expected):
    assert complaint(write(text + MODEL if "3GiB" not in text else text)) == expected


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ("", ': no models: add a [[models]] table with an "id" and a "source" for each'),
        ("[models]\nid = 1\n", ":1: write each model under a header of its own: [[models]]"),
        ('[[models]]\nsource = "org/m"\n', ':1: [[models]] needs "id"'),
        (
            '[[models]]\nid = "m"\n',
            ':1: model "m" needs a source: a checkpoint folder, a hub id, or "random:" with a config',
        ),
        (MODEL + MODEL, ':5: model id "m" is taken by the [[models]] table number 1'),
        (MODEL + 'task = "chat"\n', ':4: task: "chat" is not allowed; choose from classify, custom, embed, generate'),
        (MODEL + 'dtype = "bfloat"\n', ':4: dtype: "bfloat" is not allowed; did you mean "bfloat16"?'),
        (MODEL + "max_batch_size = 0\n", ":4: max_batch_size: must be at least 1, not 0"),
        (MODEL + 'factory = "a:b"\n', ':4: factory: only models with task = "custom" have one'),
        (
            '[[models]]\nid = "m"\ntask = "custom"\n',
            ':1: model "m" has task "custom" and needs factory = "package.module:function"',
        ),
        (
            '[[models]]\nid = "m"\ntask = "custom"\nfactory = "a.b"\n',
            ':4: factory: "a.b" must look like "package.module:name"',
        ),
        (
            '[[models]]\nid = "a b"\nsource = "x"\n',
            ':2: id: "a b" must not be empty nor contain spaces or any of ? # %',
        ),
    ],
)
def test_a_wrong_model_is_named_with_its_line_and_the_remedy(write, models, expected):
    assert complaint(write(models)) == expected


@pytest.mark.parametrize("section", [field.name for field in dataclasses.fields(Config)])
def test_every_key_is_documented(section):
    kind = ModelConfig if section == "models" else type(getattr(Config(), section))
    text = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    for field in dataclasses.fields(kind):
        assert f"| `{field.name}` |" in text


def test_a_missing_file_is_named(tmp_path):
    assert complaint(tmp_path / "none.toml") == ": No such file or directory"


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe")
    assert complaint(path) == ": not UTF-8 text (invalid start byte at byte 0)"


def test_relative_paths_start_at_the_config_file(write, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    path = write(
        '[[models]]\nid = "a"\nsource = "checkpoint"\nchat_template = "chat.jinja"\n'
        '[[models]]\nid = "b"\nsource = "random:checkpoint"\nchat_template = "{{ messages }}"\n'
        '[[models]]\nid = "c"\nsource = "org/name"\n'
        '[[models]]\nid = "d"\nsource = "random:tiny"\n'
    )
    a, b, c, d = load_config(path).models
    assert a.source == str(tmp_path / "checkpoint")
    assert a.chat_template == str(tmp_path / "chat.jinja")
    assert b.source == f"random:{tmp_path / 'checkpoint'}"
    assert b.chat_template == "{{ messages }}"
    assert (c.source, d.source) == ("org/name", "random:tiny")


@pytest.mark.parametrize("source", ["./gone", "gone/for/good", "random:../gone"])
def test_a_path_that_does_not_exist_is_named(write, tmp_path, source):
    path = (tmp_path / source.removeprefix("random:")).resolve()
    text = f'[[models]]\nid = "a"\nsource = "{source}"\n'
    assert complaint(write(text)) == f":3: source: {path} does not exist"
    (model,) = load_config(write(text), sources_exist=False).models
    assert model.source.removeprefix("random:") == str(path)


@pytest.mark.parametrize("source", ["models/smolm2", "random:opt-1t"])
def test_a_source_that_is_neither_folder_nor_model_is_told_with_the_folder_it_would_be(write, tmp_path, source):
    path = write(f'[[models]]\nid = "a"\nsource = "{source}"\n')
    (model,) = load_config(path).models
    error = CheckpointError(f'model "a": source "{model.source}" is not there')
    folder = tmp_path / source.removeprefix("random:")
    assert with_place(path, error) == f"{path}:3: {error.message} (as a folder it would be {folder})"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("too small", param="device.memory"), ":3: too small"),
        (ConfigError("too small", param="device.page_size"), ":1: too small"),
        (ConfigError("too small", param="host.memory"), ": too small"),
        (ConfigError('model "b": its factory x raised'), ':10: model "b": its factory x raised'),
        (
            CheckpointError('model "b": /x/model.safetensors: truncated'),
            ':7: model "b": /x/model.safetensors: truncated',
        ),
        (ConfigError("model 'a' needs 3 MiB"), ":4: model 'a' needs 3 MiB"),
    ],
)
def test_an_error_that_comes_up_later_finds_its_line(write, error, expected):
    text = (
        '[device]\nkind = "host"\nmemory = "1MiB"\n[[models]]\nid = "a"\nsource = "org/a"\n'
        '[[models]]\nid = "b"\ntask = "custom"\nfactory = "x:y"\n'
    )
    path = write(text)
    assert with_place(path, error) == f"{path}{expected}"


def test_an_error_about_nothing_in_the_file_stays_as_it_is(write):
    assert with_place(write(MODEL), ConfigError("no such thing")) == "no such thing"


def test_lines_of_keys_survive_strings_and_arrays_over_several_lines():
    text = '''a = """
b = 1
[fake]
"""
c = [
  [1],
  "d = 2",
] # e = 3
[x."y z"]
"quoted" = 1
[[m]]
k = 1
[m.sub]
k = 2
[[m]]
k = 3
'''
    assert key_lines(text) == {
        ("a",): 1,
        ("c",): 5,
        ("x", "y z"): 9,
        ("x", "y z", "quoted"): 10,
        ("m", 0): 11,
        ("m", 0, "k"): 12,
        ("m", 0, "sub"): 13,
        ("m", 0, "sub", "k"): 14,
        ("m", 1): 15,
        ("m", 1, "k"): 16,
    }


def test_every_policy_of_the_scheduler_can_be_configured():
    assert set(POLICIES) == set(policies.POLICIES)


def test_a_models_queue_is_as_long_as_the_schedulers_unless_it_says_otherwise(write):
    text = f'[scheduler]\nmax_queue = 7\n{MODEL}[[models]]\nid = "n"\nsource = "org/n"\nmax_queue = 3\n'
    assert [model.max_queue for model in load_config(write(text)).models] == [7, 3]
