from __future__ import annotations

import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from computron.errors import CheckpointError
from computron.models import plan_model
from computron.models.images import CheckpointImage, StateImage
from computron.models.layout import lay_out
from computron.models.random_image import CHUNK, RandomImage
from computron.models.safetensors_file import read_header

PIECES = st.tuples(st.floats(0, 1), st.integers(0, 5000))


def read(image, offset, nbytes):
    buffer = bytearray(b"\xff" * nbytes)
    image.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def expected_bytes(layout, tensors):
    image = bytearray(layout.nbytes)
    for slot in layout.slots:
        image[slot.offset : slot.offset + slot.nbytes] = raw(tensors[slot.name].to(slot.dtype))
    return bytes(image)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "opt", "gpt2", "gemma3"])
def test_bytes_of_each_tensor_equal_the_files(architecture, checkpoint, config):
    folder = checkpoint("generate", architecture, torch.bfloat16)
    plan = plan_model(config(folder))
    file = load_file(folder / "model.safetensors")
    names = {slot.name: slot.name for slot in plan.tensors}
    if architecture == "gpt2":  # saved without the base model's prefix or with it, as transformers pleases
        names = {name: name if name in file else name.removeprefix("transformer.") for name in names}
    assert {names[slot.name] for slot in plan.tensors} == set(file)
    for slot in plan.tensors:
        assert read(plan.image, slot.offset, slot.nbytes) == raw(file[names[slot.name]])


@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), piece=PIECES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_piece_can_be_read_in_any_dtype(dtype, piece, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn((13, 7), generator=generator),
        "b": torch.randn((700,), generator=generator).to(torch.bfloat16),
        "c": torch.arange(5),
        "d": torch.randn((64, 3), generator=generator),
    }
    file = tmp_path / "model.safetensors"
    if not file.exists():
        save_file(tensors, file)
    described = {
        name: (dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    layout = lay_out([("one", ["d", "a"]), ("two", ["b", "c"])], described, {})
    image = CheckpointImage(layout, read_header(file))
    expected = expected_bytes(layout, tensors)
    offset = int(piece[0] * (layout.nbytes - 1))
    nbytes = min(piece[1], layout.nbytes - offset)
    assert read(image, offset, nbytes) == expected[offset : offset + nbytes]
    extents = image.extents(offset, nbytes)
    if extents is not None:
        found = bytearray(nbytes)
        for extent in extents:
            begin = extent.offset - offset
            found[begin : begin + extent.nbytes] = extent.path.read_bytes()[extent.file_offset :][: extent.nbytes]
        assert bytes(found) == expected[offset : offset + nbytes]


def test_extents_are_given_where_no_conversion_is_needed(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    layout = lay_out([("s", ["a", "b"])], {"a": (torch.float32, (4,)), "b": (torch.float32, (4,))}, {})
    image = CheckpointImage(layout, read_header(tmp_path / "m.safetensors"))
    extents = image.extents(0, 256)
    assert extents is not None
    assert [extent.nbytes for extent in extents] == [16]
    assert image.extents(0, 257) is None
    assert image.extents(100, 50) == []


def test_reading_in_several_threads_gives_the_same_bytes(checkpoint, config, filled):
    plan = plan_model(config(checkpoint("generate", "gpt2"), dtype="float16"))
    expected = filled(plan)
    buffer = torch.zeros_like(expected)
    view = memoryview(buffer.numpy())
    offsets = list(range(0, plan.image.nbytes, 4099))

    def work(part):
        for offset in offsets[part::4]:
            plan.image.read_into(offset, view[offset : offset + 4099])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(buffer, expected)


def test_a_file_that_changed_is_not_read_as_if_nothing_had_happened(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    plan = plan_model(config(folder))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was served \(tensor .+\)"):
        read(plan.image, 0, plan.image.nbytes)


def test_a_file_that_vanished_is_named(new_checkpoint, config):
    folder = new_checkpoint("generate", "llama")
    plan = plan_model(config(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: No such file.*\(tensor "):
        read(plan.image, 0, plan.image.nbytes)


def test_pieces_outside_the_image_are_refused(checkpoint, config):
    plan = plan_model(config(checkpoint("generate", "llama")))
    with pytest.raises(ValueError, match="outside an image"):
        read(plan.image, plan.image.nbytes - 1, 2)


def test_made_tensors_are_let_go_once_all_has_been_read():
    layout = lay_out([("s", ["a", "b"])], {"a": (torch.float32, (100,)), "b": (torch.float32, (100,))}, {})
    calls = []

    def make():
        calls.append(None)
        return {"a": torch.full((100,), 1.0), "b": torch.full((100,), 2.0)}

    image = StateImage(layout, make)
    first = read(image, 0, layout.nbytes)
    assert len(calls) == 1
    assert image._state is None
    assert read(image, 0, layout.nbytes) == first
    assert len(calls) == 2


@given(seed=st.integers(0, 3), piece=PIECES)
@settings(max_examples=30)
def test_random_bytes_do_not_depend_on_how_they_are_read(seed, piece):
    described = {"w": (torch.bfloat16, (3, CHUNK // 2)), "norm.weight": (torch.float32, (40,))}
    layout = lay_out([("s", list(described))], described, {})
    whole = read(RandomImage(layout, seed=seed), 0, layout.nbytes)
    offset = int(piece[0] * (layout.nbytes - 1))
    nbytes = min(piece[1], layout.nbytes - offset)
    assert read(RandomImage(layout, seed=seed), offset, nbytes) == whole[offset : offset + nbytes]


def test_random_weights_differ_by_seed_and_tensor_and_have_the_models_deviation():
    described = dict.fromkeys("ab", (torch.float32, (300, 300))) | {
        "b.bias": (torch.float32, (64,)),
        "norm.weight": (torch.float32, (64,)),
    }
    layout = lay_out([("s", list(described))], described, {})

    def tensor(seed, name):
        image = RandomImage(layout, seed=seed, deviation=0.1)
        slot = next(slot for slot in layout.slots if slot.name == name)
        return torch.frombuffer(bytearray(read(image, slot.offset, slot.nbytes)), dtype=torch.float32)

    assert not torch.equal(tensor(0, "a"), tensor(0, "b"))
    assert not torch.equal(tensor(0, "a"), tensor(1, "a"))
    assert tensor(0, "a").std().item() == pytest.approx(0.1, rel=0.02)
    assert bool((tensor(0, "b.bias") == 0).all())
    assert bool((tensor(0, "norm.weight") == 1).all())
