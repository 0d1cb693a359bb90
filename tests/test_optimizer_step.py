"""A step of an optimizer: whose weights it moves, by how much; functions that a GPU records."""

import numpy as np
import pytest
import torch
from helpers.agents import SHAPES, every_script, make, make_batch, make_optimizers, same, update
from torch import nn

import dreamerv1
import dreamerv2
import runtime


@pytest.fixture(params=[dreamerv1, dreamerv2], ids=["dreamerv1", "dreamerv2"])
def opt_step(request):
    return request.param.opt_step


@pytest.fixture
def networks():
    """The one that learns, one that its gradient passes through, and an optimizer of the former."""
    mine = nn.Linear(3, 2)
    return mine, nn.Linear(2, 1), torch.optim.SGD(mine.parameters(), lr=1.0)


def copied(module):
    return [p.detach().clone() for p in module.parameters()]


def test_opt_step_clips_by_the_global_norm_and_says_what_it_was(opt_step):
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    target = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 12.0])]

    def step(clip):
        loss = -sum((w * t).sum() for w, t in zip(weights, target, strict=True))
        return opt_step(optimizer, loss, clip)

    assert step(6.5).item() == pytest.approx(13)
    for weight, t in zip(weights, target, strict=True):
        torch.testing.assert_close(weight.detach(), t / 2)
    assert step(100.0).item() == pytest.approx(13)  # no gradient is left from before
    for weight, t in zip(weights, target, strict=True):
        torch.testing.assert_close(weight.detach(), t * 1.5)


def test_gradients_flow_through_another_module_which_stays_as_it_is(opt_step, networks):
    mine, other, optimizer = networks
    old = mine.weight.detach().clone()
    before = copied(other)
    norm = opt_step(optimizer, other(mine(torch.ones(5, 3))).sum(), 100.0)
    step = 5 * other.weight.detach().T  # (2, 1), of 5 rows of ones
    torch.testing.assert_close(old - mine.weight.detach(), step.expand(2, 3))
    torch.testing.assert_close(norm, step.expand(2, 4).norm())  # with the bias
    assert [p.grad for p in other.parameters()] == [None, None]
    assert all(p.requires_grad for p in other.parameters())
    assert all(map(torch.equal, copied(other), before))


def test_gradients_that_another_module_has_stay_there(opt_step, networks):
    mine, other, optimizer = networks
    for parameter in other.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # of a step of its own
    opt_step(optimizer, other(mine(torch.ones(5, 3))).sum(), 100.0)
    assert all((parameter.grad == 7).all() for parameter in other.parameters())


def test_a_parameter_that_requires_no_gradient_stays_as_it_is(opt_step):
    mine = nn.Linear(3, 2)
    mine.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1.0, weight_decay=0.5)
    weight, bias = (p.detach().clone() for p in mine.parameters())
    norm = opt_step(optimizer, mine(torch.ones(5, 3)).sum(), 100.0)
    assert mine.weight.equal(weight)
    assert mine.weight.grad is None
    assert not mine.bias.equal(bias)
    assert norm.item() == pytest.approx(np.sqrt(2 * 5**2))  # of the bias alone
    mine.weight.requires_grad_(True)
    opt_step(optimizer, mine(torch.ones(5, 3)).sum(), 100.0)
    assert not mine.weight.equal(weight)


def test_a_parameter_that_the_loss_does_not_reach_stays_as_it_is(opt_step):
    used = nn.Parameter(torch.ones(2))
    unused = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([used, unused], lr=1.0, weight_decay=0.5)
    opt_step(optimizer, used.sum(), 100.0)
    assert used.max() < 1
    assert unused.tolist() == [1, 1]


@pytest.mark.parametrize("enabled", [True, False])
def test_without_a_gpu_a_captured_function_is_called_each_time_with_rows_as_tensors(enabled):
    calls = []
    captured = runtime.Captured(lambda *x: calls.append(x) or x, torch.device("cpu"), enabled)
    for i in range(6):
        row = {"vector": np.full((2, 3), i, np.float32), "is_first": np.arange(2) == i}
        given, state = captured(row, {"deter": torch.full((2, 1), i)})
        assert len(calls) == i + 1
        assert all(torch.is_tensor(v) for v in (*given.values(), *state.values()))
        assert given["vector"].tolist() == [[i] * 3] * 2
        assert given["is_first"].tolist() == [i == 0, i == 1]
        assert state["deter"].tolist() == [[i]] * 2


@every_script
def test_means_over_processes_that_agree_move_weights_as_the_gradients_of_one(script, monkeypatch):
    """Weights of convolutions lie in memory otherwise than their shapes say."""

    def weights():
        torch.manual_seed(1)
        batch = make_batch(SHAPES)
        x = make(script, SHAPES)
        optimizers = make_optimizers(x)
        for _ in range(3):
            update(x, batch, optimizers)
        return x.agent.state_dict()

    one = weights()
    monkeypatch.setattr(runtime, "WORLD", 2)
    monkeypatch.setattr(runtime, "process_mean", lambda x: x)
    monkeypatch.setattr(runtime, "process_cat", lambda x: x)
    assert same(weights(), one)
