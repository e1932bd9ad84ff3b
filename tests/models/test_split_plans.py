"""Which parts a model can be split into, and what is said where it cannot."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from transformers import BloomConfig, ConvNextConfig, DogeConfig, T5Config

from computron.errors import CheckpointError, ConfigError
from computron.models import Shard, load_model, plan_model
from computron.models.byte_tokenizer import byte_tokenizer
from computron.models.pipeline import balance
from computron.models.tensor_parallel import shares


def test_ranks_count_stage_after_stage():
    shards = [Shard.of_rank(rank, 3, 2) for rank in range(6)]
    assert [(shard.stage, shard.tensor_rank) for shard in shards] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [shard.rank for shard in shards] == list(range(6))
    assert [shard.first for shard in shards] == [True] * 3 + [False] * 3
    assert [shard.last for shard in shards] == [False] * 3 + [True] * 3
    assert [shard.gives_result for shard in shards] == [False] * 3 + [True] + [False] * 2
    assert Shard().whole
    assert Shard().gives_result
    assert not shards[0].whole
    with pytest.raises(ValueError, match="no such part"):
        Shard(2, 2)


@given(size=st.integers(0, 1000), nodes=st.integers(1, 9))
def test_shares_are_even_and_cover_all(size, nodes):
    ranges = shares(size, nodes)
    assert len(ranges) == nodes
    assert [0, *(end for _, end in ranges)] == [*(begin for begin, _ in ranges), size]
    widths = [end - begin for begin, end in ranges]
    assert max(widths) - min(widths) <= 1


@given(
    before=st.integers(0, 30),
    layers=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    after=st.integers(0, 30),
    data=st.data(),
)
def test_the_largest_stage_is_as_small_as_can_be(before, layers, after, data):
    stages = data.draw(st.integers(1, len(layers)))

    def sizes(ranges):
        found = [sum(layers[index] for index in each) for each in ranges]
        found[0] += before
        found[-1] += after
        return max(found), sum(size**2 for size in found)

    cuts = itertools.combinations(range(1, len(layers)), stages - 1)
    all_ranges = [[range(a, b) for a, b in itertools.pairwise((0, *cut, len(layers)))] for cut in cuts]
    ranges = balance(before, layers, after, stages)
    assert [index for each in ranges for index in each] == list(range(len(layers)))
    assert all(len(each) > 0 for each in ranges)
    assert sizes(ranges) == min(sizes(each) for each in all_ranges)


@pytest.mark.parametrize(("heads", "nodes", "message"), [
    ("llama", 3, "4 attention heads with 2 key-value heads cannot be split over 3 nodes; "
                 "set tensor_parallel to 1, 2 or 4"),
    ("llama-odd", 2, "6 attention heads with 3 key-value heads cannot be split over 2 nodes; "
                     "set tensor_parallel to 1, 3 or 6"),
    ("opt", 8, "4 attention heads cannot be split over 8 nodes; set tensor_parallel to 1, 2 or 4"),
])  # fmt: skip
def test_heads_that_do_not_divide_are_named_with_the_remedy(heads, nodes, message, checkpoint, config):
    with pytest.raises(CheckpointError, match=f'^model "m": {message}$'):
        plan_model(config(checkpoint("generate", heads)), Shard(nodes))


def test_nine_heads_of_a_preset(config):
    with pytest.raises(CheckpointError, match=r"9 attention heads with 3 .* set tensor_parallel to 1, 3 or 9"):
        plan_model(config("random:smollm2-135m"), Shard(2))


def test_more_stages_than_layers_are_refused(checkpoint, config):
    with pytest.raises(CheckpointError, match="3 layers cannot be split over 4 stages; set pipeline_parallel to 3 or"):
        plan_model(config(checkpoint("generate", "llama")), Shard(pipeline_parallel=4))


def test_experts_are_not_split_by_tensor(checkpoint, config):
    with pytest.raises(CheckpointError, match=r'needs the split "moe_tp_experts" of .*experts, which is not supported; '
                                              "set tensor_parallel to 1; pipeline_parallel can"):  # fmt: skip
        plan_model(config(checkpoint("generate", "mixtral")), Shard(2))


def test_an_architecture_without_a_plan_is_refused(tmp_path, config):
    BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    byte_tokenizer(300).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="BloomModel has no plan for tensor parallelism; set tensor_parallel to"):
        plan_model(config(f"random:{tmp_path}", task="embed"), Shard(2))


def test_attention_with_weights_of_its_own_is_not_split_by_tensor(tmp_path, config):
    DogeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(tmp_path)  # fmt: skip
    byte_tokenizer(300).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"self_attn, a DogeAttention, has weights of its own \(A\)"):
        plan_model(config(f"random:{tmp_path}", max_model_len=16), Shard(2))


def test_what_layers_hand_on_beside_hidden_states_is_found(checkpoint, config):
    with pytest.raises(CheckpointError, match="MPNetModel cannot be split over stages: layer 0 reads more of what was"):
        plan_model(config(checkpoint("embed", "mpnet"), task="embed"), Shard(pipeline_parallel=2))


def test_layers_that_change_shapes_are_not_split(tmp_path, config):
    ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], image_size=32, num_labels=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(CheckpointError, match="changes the shape of its hidden states; set pipeline_parallel to 1"):
        plan_model(config(f"random:{tmp_path}", task="classify"), Shard(pipeline_parallel=2))


def test_an_encoder_decoder_is_not_split_over_stages(tmp_path, config):
    T5Config(vocab_size=300, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48, num_labels=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(CheckpointError, match="it is not one list of layers"):
        plan_model(config(f"random:{tmp_path}", task="classify"), Shard(pipeline_parallel=2))


class Halves(nn.Module):
    """Half of a sum on each node."""

    def __init__(self, shard: Shard, width: int) -> None:
        super().__init__()
        self.shard = shard
        whole = torch.arange(float(width))
        self.weight = nn.Parameter(whole.chunk(shard.tensor_parallel)[shard.tensor_rank].clone())
        self.communicator = None

    def set_communicator(self, communicator):
        self.communicator = communicator

    def forward(self, x):
        part = x.chunk(self.shard.tensor_parallel, -1)[self.shard.tensor_rank] @ self.weight
        return part if self.communicator is None else self.communicator.all_reduce(part)


def make_halves(width, shard=Shard()):  # noqa: B008
    return Halves(shard, width)


def make_whole(width):
    return Halves(Shard(), width)


@pytest.fixture
def custom(config):
    return lambda name: config(task="custom", factory=f"{__name__}:{name}", arguments={"width": 6})


def test_a_custom_factory_that_takes_shard_gives_parts(custom, filled, new_group):
    model = custom("make_halves")
    x = torch.arange(12.0).view(2, 6)
    plan = plan_model(model)
    expected = load_model(plan, filled(plan)).forward(x)
    group = new_group(model, 2, 1)
    assert [plan.tensors[0].shape for plan in group.plans] == [(3,), (3,)]
    outputs = group.run(lambda part, _: part.forward(x))
    assert all(torch.equal(output, expected) for output in outputs)


def test_a_custom_factory_that_takes_no_shard_cannot_be_split(custom, filled):
    plan = plan_model(custom("make_whole"))
    assert load_model(plan, filled(plan)).forward(torch.ones(6)) == 15
    with pytest.raises(ConfigError, match='takes no keyword argument "shard", so the model cannot be split over 2'):
        plan_model(custom("make_whole"), Shard(2))
