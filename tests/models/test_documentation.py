"""The fragments of docs/models.md are configurations as they stand, and the models in them can be served."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from computron.config import load_config
from computron.models import plan_model

ROOT = Path(__file__).parents[2]
FRAGMENTS = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), re.DOTALL)
EXAMPLES = ("echo.toml", "mlp.toml", "efficientnet.toml")
CACHE = "~/.cache/computron/demo"
ON_THE_HUB = ("distilbert/", "google/")


def read(text, folder):
    file = folder / "serve.toml"
    file.write_text('[device]\nkind = "host"\nmemory = "1GiB"\n' + text, encoding="utf-8")
    return load_config(file)


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_every_fragment_is_a_configuration(fragment, tmp_path):
    for name in re.findall(rf"{CACHE}/([\w-]+)", fragment):
        (tmp_path / name).mkdir(exist_ok=True)
    assert read(fragment.replace(CACHE, str(tmp_path)), tmp_path).models


@pytest.mark.models
@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_every_model_of_the_fragments_can_be_planned(fragment, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    fragment = fragment.replace(CACHE, str(demo.smollm2.parent))
    for model in read(fragment, tmp_path).models:
        if not model.source.startswith(ON_THE_HUB):
            assert plan_model(model).image.nbytes > 0


@pytest.mark.models
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_can_be_planned(name, demo, monkeypatch):
    monkeypatch.chdir(ROOT)
    for model in load_config(ROOT / "examples" / name).models:
        plan_model(model)
