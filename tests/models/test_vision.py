from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from computron.errors import BadRequest, CheckpointError
from computron.models import load_model, plan_model


@pytest.fixture
def vit(checkpoint, config, filled):
    plan = plan_model(config(checkpoint("classify", "vit"), task="classify"))
    return load_model(plan, filled(plan))


def picture(mode="RGB", file_format="PNG", size=(50, 40)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(values).convert(mode).save(data, file_format)
    return data.getvalue()


def test_pixels_are_what_the_checkpoints_processor_makes(vit, checkpoint):
    data = picture()
    processor = ViTImageProcessorPil.from_pretrained(checkpoint("classify", "vit"))
    expected = processor(images=[Image.open(io.BytesIO(data))], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(vit.pixels(data), expected)
    assert vit.pixels(data).shape == (3, 32, 32)


@pytest.mark.parametrize(("mode", "file_format"), [("L", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG"), ("P", "GIF")])
def test_every_usual_kind_of_image_is_taken(mode, file_format, vit):
    assert vit.pixels(picture(mode, file_format)).shape == (3, 32, 32)


@pytest.mark.parametrize("data", [b"", b"no image", picture()[:200]])
def test_what_is_no_image_is_the_clients_mistake(data, vit):
    with pytest.raises(BadRequest, match="not an image that can be read"):
        vit.pixels(data)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(vit, monkeypatch):
    monkeypatch.setattr("computron.models.vision.MAX_PIXELS", 1999)
    with pytest.raises(BadRequest, match="50 x 40 pixels, more than 1999"):
        vit.pixels(picture())


def test_labels_are_those_of_the_config(vit):
    assert vit.plan.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert vit.plan.activation == "softmax"
    assert vit.plan.takes_images


@pytest.mark.parametrize(
    "settings",
    [
        {"image_processor_type": "ViTImageProcessorFast"},
        {"image_processor_type": "ViTFeatureExtractor", "size": 32},
        {"feature_extractor_type": "ViTFeatureExtractor", "size": 32},
    ],
)
def test_older_and_newer_names_of_a_processor_are_understood(settings, new_checkpoint, config, vit):
    folder = new_checkpoint("classify", "vit")
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text())
    del content["image_processor_type"]
    file.write_text(json.dumps(content | settings))
    processor = plan_model(config(folder, task="classify")).image_processor
    assert torch.equal(processor(picture()), vit.pixels(picture()))


def test_a_checkpoint_without_preprocessor_is_refused(new_checkpoint, config):
    folder = new_checkpoint("classify", "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json.*copy it"):
        plan_model(config(folder, task="classify"))


def test_a_broken_preprocessor_is_named(new_checkpoint, config):
    folder = new_checkpoint("classify", "vit")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json: transformers cannot use it"):
        plan_model(config(folder, task="classify"))
