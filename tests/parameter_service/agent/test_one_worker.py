"""One worker's parameters are those of torch's fused optimizers, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import computron.parameter_service as service

CASES = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd with momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd with nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "sgd with dampening": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "adam": ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "adam with amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6}),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, 70), nn.Tanh(), nn.Linear(70, 33), nn.Tanh(), nn.Linear(33, 3))


def pair(cluster, kind, arguments, **settings):
    """The same network twice: trained by the service and by torch."""
    ours, theirs = network(), network()
    mine = getattr(service, kind)(ours.named_parameters(), service=cluster.service(**settings), **arguments)
    return ours, mine, theirs, getattr(torch.optim, kind)(theirs.parameters(), fused=True, **arguments)


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 50, generator=generator) for _ in range(count)]


def loss(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_torch(cluster, case, shared):
    ours, mine, theirs, torchs = pair(cluster, *CASES[case], shared_memory=shared)
    with mine:
        for step, batch in enumerate(batches(5), 1):
            for model, optimizer in ((ours, mine), (theirs, torchs)):
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert mine.steps == step
            assert same(ours, theirs)
    assert same(ours, theirs)  # leaving the job changes nothing


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
def test_what_scripts_do_between_backward_and_step_counts(cluster, shared):
    """Accumulation, torch's clipping, edited and replaced gradients, gradients kept or zeroed in place."""
    ours, mine, theirs, torchs = pair(cluster, "AdamW", {"lr": 0.01}, shared_memory=shared)
    with mine:
        for step, batch in enumerate(batches(6)):
            for model, optimizer in ((ours, mine), (theirs, torchs)):
                for part in batch.split(8):
                    loss(model, part).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                weight = next(model.parameters())
                weight.grad[0].mul_(3)
                if step == 3:
                    weight.grad = torch.ones_like(weight)
                optimizer.step()
                if step % 3 < 2:
                    optimizer.zero_grad(set_to_none=step % 3 == 0)
            assert same(ours, theirs)


def test_groups_and_schedules_are_honoured(cluster):
    ours, theirs = network(), network()

    def groups(model):
        return [
            {"params": list(model[0].parameters()), "lr": 0.1},
            {"params": list(model[2:].parameters()), "weight_decay": 0.0, "betas": (0.5, 0.6)},
        ]

    with service.AdamW(groups(ours), service=cluster.service()) as mine:
        torchs = torch.optim.AdamW(groups(theirs), fused=True)
        schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (mine, torchs)]
        for batch in batches(6):
            for model, optimizer, schedule in zip((ours, theirs), (mine, torchs), schedules, strict=True):
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
                schedule.step()
            mine.param_groups[1]["eps"] = torchs.param_groups[1]["eps"] = 1e-4
            assert same(ours, theirs)
        assert mine.param_groups[0]["lr"] == torchs.param_groups[0]["lr"] < 0.1


def test_a_closure_and_hooks_are_called(cluster):
    ours, mine, theirs, torchs = pair(cluster, "SGD", {"lr": 0.1})
    calls = []
    mine.register_step_pre_hook(lambda *_: calls.append("before"))
    mine.register_step_post_hook(lambda *_: calls.append("after"))
    batch = batches(1)[0]

    def closure(model, optimizer):
        def compute():
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            return value

        return compute

    with mine:
        assert torch.equal(mine.step(closure(ours, mine)), torchs.step(closure(theirs, torchs)))
    assert calls == ["before", "after"]
    assert same(ours, theirs)


def test_tied_and_frozen_parameters(cluster):
    ours = network()
    ours[0].bias.requires_grad_(False)
    ours.extend([nn.Linear(3, 33), nn.Linear(33, 3)])
    ours[6].weight = ours[4].weight
    theirs = copy.deepcopy(ours)
    with service.AdamW(ours.parameters(), lr=0.01, service=cluster.service()) as mine:
        torchs = torch.optim.AdamW(theirs.parameters(), lr=0.01, fused=True)
        for batch in batches(3):
            for model, optimizer in ((ours, mine), (theirs, torchs)):
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert same(ours, theirs)
    assert ours[6].weight is ours[4].weight
    assert not ours[0].bias.requires_grad


def test_a_missing_gradient_is_an_error_or_zero(cluster):
    ours, mine, theirs, torchs = pair(cluster, "SGD", {"lr": 0.1})
    with mine:
        ours[0](batches(1)[0]).sum().backward()
        with pytest.raises(ValueError, match=r"2\.weight has no gradient in this step"):
            mine.step()
    found = pair(cluster, "SGD", {"lr": 0.1, "weight_decay": 0.5}, job="other", find_unused_parameters=True)
    ours, mine, theirs, torchs = found
    with mine:
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            model[0](batches(1)[0]).sum().backward()
            if model is ours:
                model[4].weight.grad = None
            optimizer.step()
        assert same(ours, theirs)  # weights that have no gradient decay


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_copies_follow_fp32_masters(cluster, dtype):
    ours = network().to(dtype)
    masters = [p.detach().float() for p in ours.parameters()]
    settings = {"gradients": str(dtype).removeprefix("torch.")}
    with service.AdamW(ours.parameters(), lr=1e-3, service=cluster.service(**settings)) as mine:
        torchs = torch.optim.AdamW(masters, lr=1e-3, fused=True)
        for batch in batches(4):
            loss(ours, batch.to(dtype)).backward()
            for master, parameter in zip(masters, ours.parameters(), strict=True):
                master.grad = parameter.grad.float()
            mine.step()
            mine.zero_grad()
            torchs.step()
            assert all(torch.equal(p, m.to(dtype)) for p, m in zip(ours.parameters(), masters, strict=True))


def test_an_overflowed_step_is_skipped_by_the_gradient_scaler(cluster):
    ours, mine, theirs, torchs = pair(cluster, "AdamW", {"lr": 0.01})
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    with mine:
        for step, batch in enumerate(batches(4)):
            for model, optimizer, scaler in zip((ours, theirs), (mine, torchs), scalers, strict=True):
                optimizer.zero_grad()
                scaler.scale(loss(model, batch)).backward()
                if step == 1:
                    next(model.parameters()).grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
            assert same(ours, theirs)
        assert scalers[0].get_scale() == scalers[1].get_scale() == 4.0


def test_the_norm_is_that_of_the_whole_gradient(cluster):
    ours, mine, theirs, torchs = pair(cluster, "SGD", {"lr": 0.1})
    with mine:
        for batch in batches(3):
            for model, optimizer in ((ours, mine), (theirs, torchs)):
                optimizer.zero_grad()
                loss(model, batch).backward()
            total = mine.clip_grad_norm_(0.05)
            expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
            mine.step()
            torchs.step()
            assert expected > 0.05
            torch.testing.assert_close(total, expected)
            for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
@pytest.mark.parametrize("case", ["sgd", "sgd with momentum", "adam with amsgrad", "adamw"])
def test_state_goes_to_torch_and_comes_from_it(cluster, case, shared):
    ours, mine, theirs, torchs = pair(cluster, *CASES[case], shared_memory=shared)
    steps = batches(6)

    def train(some):
        for batch in some:
            for model, optimizer in ((ours, mine), (theirs, torchs)):
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()

    with mine:
        assert mine.state_dict()["state"] == {}
        train(steps[:2])
        fused = torchs.param_groups[0]["fused"]
        torchs.load_state_dict(mine.state_dict())
        torchs.param_groups[0]["fused"] = fused
        train(steps[2:3])
        assert same(ours, theirs)
        earlier, parameters = copy.deepcopy(torchs.state_dict()), copy.deepcopy(theirs.state_dict())
        train(steps[3:5])
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            model.load_state_dict(parameters)
            optimizer.load_state_dict(earlier)
        train(steps[5:])
        assert same(ours, theirs)


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "tcp"])
def test_overlapping_waits_where_parameters_are_used(cluster, shared):
    ours, mine, theirs, torchs = pair(cluster, "AdamW", {"lr": 0.01}, shared_memory=shared)
    mine.overlap(ours)
    with mine:
        for batch in batches(6):
            for model, optimizer in ((ours, mine), (theirs, torchs)):
                optimizer.zero_grad(set_to_none=False)
                loss(model, batch).backward()
                optimizer.step()
            pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        mine.wait()
        assert same(ours, theirs)


def test_arguments_that_have_no_meaning_are_refused():
    parameters = [nn.Parameter(torch.ones(2))]
    with pytest.raises(TypeError, match="fused=True has no meaning here"):
        service.AdamW(parameters, fused=True)
    with pytest.raises(TypeError, match="unknown argument eps"):
        service.SGD(parameters, eps=1e-3)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        service.Adam(parameters, lr=-1.0)


def test_parameters_cannot_be_added_later(cluster):
    _, mine, _, _ = pair(cluster, "SGD", {"lr": 0.1})
    assert isinstance(mine, torch.optim.Optimizer)
    with mine, pytest.raises(RuntimeError, match="pass all groups at the start"):
        mine.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
