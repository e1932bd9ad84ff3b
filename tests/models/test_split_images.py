"""Images of parts: each node reads its own slices and nothing else, and together they are the whole checkpoint."""

from __future__ import annotations

import math
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file

from computron.models import Shard, plan_model
from computron.models.images import CheckpointImage, StateImage
from computron.models.layout import lay_out
from computron.models.random_image import CHUNK, RandomImage
from computron.models.safetensors_file import read_header
from computron.models.sliced_image import slice_image
from computron.models.tensor_parallel import Part

# Dimensions along which the nodes' parts are joined; all else is on every node.
LLAMA = dict.fromkeys(("embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight",
                       "gate_proj.weight", "up_proj.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias",
                       "gate_proj.bias", "up_proj.bias"), 0)  # fmt: skip
LLAMA |= dict.fromkeys(("o_proj.weight", "down_proj.weight"), 1)
OPT = {"embed_tokens.weight": 0, "lm_head.weight": 0, "out_proj.weight": 1, "fc2.weight": 1}
OPT |= {f"{name}_proj.{kind}": 0 for name in "qkv" for kind in ("weight", "bias")}
OPT |= {"fc1.weight": 0, "fc1.bias": 0}
ONCE = ("o_proj.bias", "down_proj.bias", "out_proj.bias", "fc2.bias")  # on the first node of a stage only


def tensors_of(plan, filled):
    buffer = filled(plan)
    held = {
        slot.name: buffer[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape)
        for slot in plan.tensors
    }
    return held | {alias: held[name] for alias, name in plan.aliases.items()}


def joined(plans, dims, filled):
    """The whole model's tensors, from what the nodes of its stages hold."""
    parts = [tensors_of(plan, filled) for plan in plans]
    whole = {}
    for name in {name for part in parts for name in part}:
        stages = {}
        for plan, part in zip(plans, parts, strict=True):
            if name in part:
                stages.setdefault(plan.shard.stage, []).append(part[name])
        dim = next((dim for key, dim in dims.items() if name.endswith(key)), None)
        for held in stages.values():
            if name.endswith(ONCE):
                assert len(held) == 1
            else:
                assert len(held) == plans[0].shard.tensor_parallel
            value = held[0] if dim is None else torch.cat(held, dim)
            assert dim is not None or all(torch.equal(value, other) for other in held)
            assert torch.equal(whole.setdefault(name, value), value)
    return whole


def check(model, tensor_parallel, pipeline_parallel, dims, filled):
    world = tensor_parallel * pipeline_parallel
    plans = [plan_model(model, Shard.of_rank(rank, tensor_parallel, pipeline_parallel)) for rank in range(world)]
    whole = tensors_of(plan_model(model), filled)
    found = joined(plans, dims, filled)
    assert set(found) == set(whole)
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name
    return plans


@pytest.mark.parametrize("group", [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize(("architecture", "dims"), [("llama", LLAMA), ("llama-tied", LLAMA), ("opt", OPT)])
def test_parts_are_the_whole_checkpoint(architecture, dims, group, new_checkpoint, config, filled):
    folder = new_checkpoint("generate", architecture, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").exists()
    check(config(folder), *group, dims, filled)


def test_uneven_parts_are_the_whole_checkpoint(checkpoint, config, filled):
    plans = check(config(checkpoint("generate", "llama-odd")), 3, 2, LLAMA, filled)
    rows = [next(slot.shape[0] for slot in plan.tensors if "embed" in slot.name) for plan in plans if plan.shard.first]
    assert rows == [101, 100, 100]


def test_another_dtype_is_converted_slice_by_slice(checkpoint, config, filled):
    check(config(checkpoint("generate", "llama"), dtype="bfloat16"), 2, 1, LLAMA, filled)


def test_random_parts_are_the_random_whole(checkpoint, config, filled):
    check(config(f"random:{checkpoint('generate', 'llama-odd')}", seed=3), 3, 2, LLAMA, filled)


def test_converted_checkpoints_are_sliced_too(checkpoint, config, filled):
    model = config(checkpoint("generate", "mixtral"))
    assert isinstance(plan_model(model, Shard(pipeline_parallel=2)).image, StateImage)
    check(model, 1, 2, {}, filled)


def test_a_tied_tensor_is_stored_once_on_a_node(checkpoint, config):
    model = config(checkpoint("generate", "llama-tied"))
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"

    def held(shard):
        plan = plan_model(model, shard)
        return [slot.name for slot in plan.tensors if slot.name in (embedding, head)], dict(plan.aliases)

    assert held(Shard(2, 1, 1, 0)) == ([embedding], {head: embedding})
    assert held(Shard(2, 1, 2, 0)) == ([embedding], {})
    assert held(Shard(2, 1, 2, 1)) == ([head], {})


@pytest.mark.parametrize("group", [(2, 1), (1, 3), (2, 2)])
def test_the_nodes_together_read_the_model_once(group, checkpoint, config, filled, monkeypatch):
    model = config(checkpoint("generate", "llama"))
    size = sum(slot.nbytes for slot in plan_model(model).tensors)
    plans = [plan_model(model, Shard.of_rank(rank, *group)) for rank in range(group[0] * group[1])]
    preadv, read = os.preadv, []

    def counting(file, buffers, offset):
        count = preadv(file, buffers, offset)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    for plan in plans:
        filled(plan)
    assert sum(read) == sum(slot.nbytes for plan in plans for slot in plan.tensors)
    assert size <= sum(read) < 1.02 * size


def test_extents_are_given_for_slices_of_rows(checkpoint, config, filled):
    plan = plan_model(config(checkpoint("generate", "llama")), Shard(2, 1, 1, 0))
    image = filled(plan).numpy().tobytes()
    for slot in plan.tensors:
        extents = plan.image.extents(slot.offset, slot.nbytes)
        if slot.name.endswith(("o_proj.weight", "down_proj.weight")):
            assert extents is None
            continue
        assert extents is not None
        (extent,) = extents
        stored = extent.path.read_bytes()[extent.file_offset :][: extent.nbytes]
        assert stored == image[slot.offset : slot.offset + slot.nbytes]


@st.composite
def slices(draw):
    shape = draw(st.sampled_from([(7,), (5, 6), (6, 500), (3, 4, 5), (3, CHUNK // 2)]))
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = sorted(draw(st.sets(st.integers(0, shape[dim]), min_size=2, max_size=4)))
    return shape, Part(dim, tuple(zip(cuts[::2], cuts[1::2], strict=False)))


@given(
    kind=st.sampled_from(["file", "converted", "random", "state"]),
    sliced=slices(),
    piece=st.tuples(st.floats(0, 1), st.integers(1, 5000)),
)
@settings(max_examples=80, deadline=None)
def test_any_piece_of_any_slice_can_be_read(kind, sliced, piece, tmp_path_factory):
    shape, part = sliced
    dtype = torch.bfloat16 if kind == "converted" else torch.float32
    layout = lay_out([("s", ["first", "w"])], {"first": (dtype, (3,)), "w": (dtype, shape)}, {})
    tensors = {"first": torch.ones(3), "w": torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    if kind == "random":
        whole = RandomImage(layout, seed=1)
        buffer = bytearray(whole.nbytes)
        whole.read_into(0, memoryview(buffer))
        held = torch.frombuffer(buffer, dtype=dtype)
        tensors["w"] = held[layout.slots[1].offset // 4 :][: math.prod(shape)].view(shape)
    elif kind == "state":
        whole = StateImage(layout, lambda: tensors)
    else:
        file = tmp_path_factory.mktemp("slices") / "model.safetensors"
        save_file(tensors, file)
        whole = CheckpointImage(layout, read_header(file))
    expected = part.of(tensors["w"]).to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    own = lay_out([("s", ["w"])], {"w": (dtype, tuple(part.of(tensors["w"]).shape))}, {})
    image = slice_image(whole, own, {"w": ("w", part)})
    offset = int(piece[0] * (len(expected) - 1))
    nbytes = min(piece[1], len(expected) - offset)
    buffer = bytearray(b"\xff" * nbytes)
    image.read_into(offset, memoryview(buffer))
    assert bytes(buffer) == expected[offset : offset + nbytes]
