"""The loss of the world model: KL, its balance and free nats, and the sum of all parts."""

import pytest
import torch
import torch.distributions as td
from helpers.agents import (
    SHAPES, B, K, S, T, both_twins, close, close_gradients, every_script, make, make_batch,
)  # fmt: skip

import dreamerv1
import dreamerv2


def distribution(script, stats):
    """The torch distribution of latents, (T, B, S)."""
    if script is dreamerv1:
        return td.Normal(stats["mean"], stats["std"])
    return td.OneHotCategorical(logits=stats["logit"])


def kl_by_hand(script, post, prior):
    if script is dreamerv1:
        ratio = (post["std"] / prior["std"]).square()
        distance = ((post["mean"] - prior["mean"]) / prior["std"]).square()
        return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)
    p, q = post["logit"].softmax(-1), prior["logit"].softmax(-1)
    return (p * (p / q).log()).sum((-2, -1))


def random_stats(x):
    """Statistics of posterior and prior, and the leaves that they are made from."""
    size = 2 * S if x.script is dreamerv1 else S * K
    leaves = [torch.randn(T, B, size).requires_grad_() for _ in range(2)]
    return *(x.rssm.stats(leaf) for leaf in leaves), leaves


@every_script
def test_kl_of_the_posterior_from_the_prior_is_summed_over_latents_and_trains_both(script):
    x = make(script)
    post, prior, leaves = random_stats(x)
    kl, expected = x.rssm.kl(post, prior), kl_by_hand(script, post, prior)
    assert kl.shape == (T, B)
    close(kl, expected, atol=1e-5)
    weight = torch.randn(T, B)
    grads = close_gradients((weight * kl).sum(), (weight * expected).sum(), leaves, 1e-5)
    assert all(g.any() for g in grads)


@both_twins
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("transform", ["tanh", "none"])
def test_model_loss_is_the_sum_of_its_scaled_parts(script, transform, head):
    scale = {"kl": 0.3, "discount": 4.0, "vector": 7.0}
    options = {f"{k}_scale": v for k, v in scale.items()}
    options |= {"gamma": 0.9, "discount_head": head}
    if script is dreamerv2:
        options["kl_balance"] = 0.5  # the gradient is that of the KL as it is
    x, batch = make(script, SHAPES, reward_transform=transform, **options), make_batch(SHAPES)
    model = x.world_model
    loss, post, metrics = model.loss(batch)
    feat = x.rssm.feat(post)
    prior = x.rssm.stats(x.rssm.img_out(post["deter"]))
    recon, steps = model.decoder(feat), T * B
    reward = batch["reward"].tanh() if transform == "tanh" else batch["reward"]
    kl = kl_by_hand(script, post, prior).mean()
    parts = {
        "image": 0.5 * (recon["image"] - (batch["image"] / 255 - 0.5)).square().sum() / steps,
        "vector": 0.5 * (recon["vector"] - batch["vector"]).square().sum() / steps,
        "reward": 0.5 * (model.reward(feat) - reward).square().sum() / steps,
        "kl": kl,
    }
    if head:
        prob, target = model.discount(feat).sigmoid(), 0.9 * (1 - batch["is_terminal"])
        parts["discount"] = -(target * prob.log() + (1 - target) * (1 - prob).log()).mean()
    total = sum(scale.get(k, 1) * v for k, v in parts.items())
    wanted = {f"losses/{k}": v for k, v in parts.items()} | {"losses/model": total, "model/kl": kl}
    for name, stats in (("post", post), ("prior", prior)):
        wanted[f"model/{name}_entropy"] = distribution(script, stats).entropy().sum() / steps
    assert metrics.keys() == wanted.keys()
    for key, value in wanted.items():
        close(metrics[key], value.detach(), atol=1e-5)
        assert not metrics[key].requires_grad
    assert (model.discount is not None) == head
    close_gradients(loss, total, list(model.parameters()), 1e-4)


@pytest.mark.parametrize("free", [2.0, 5.0])
def test_free_nats_of_dreamerv1_are_for_the_mean_of_the_batch_and_not_for_each_step(
    free, monkeypatch
):
    x, batch = make(dreamerv1, free_nats=free, kl_scale=0.7), make_batch()
    kl = torch.linspace(0, 8, T * B).reshape(T, B).requires_grad_()  # mean 4, ends on both sides
    monkeypatch.setattr(x.rssm, "kl", lambda post, prior: kl)
    loss, _, metrics = x.world_model.loss(batch)
    close(metrics["losses/kl"], torch.tensor(max(4.0, free)))
    close(metrics["model/kl"], torch.tensor(4.0))
    assert kl.detach().clamp(min=free).mean() > max(4.0, free) + 0.1  # what each step would give
    pull = 0.7 / (T * B) if free < 4 else 0.0
    close(torch.autograd.grad(loss, kl)[0], torch.full((T, B), pull))


# DreamerV2's balance


def balanced(**options):
    """The KL loss of random latents, their KL of each step, and the leaves of both."""
    x = make(dreamerv2, **options)
    post, prior, leaves = random_stats(x)
    loss, kl = x.world_model.kl_loss(post, prior)
    plain = x.rssm.kl(post, prior)
    close(kl, plain)
    return loss, plain, leaves


@pytest.mark.parametrize("balance", [0.8, 0.3])
def test_kl_balance_is_the_share_that_trains_the_prior(balance):
    loss, kl, leaves = balanced(kl_balance=balance)
    close(loss, kl.mean())
    for_post, for_prior = torch.autograd.grad(kl.mean(), leaves, retain_graph=True)
    ours = torch.autograd.grad(loss, leaves)
    close(ours[0], (1 - balance) * for_post)
    close(ours[1], balance * for_prior)


@pytest.mark.parametrize("free_avg", [True, False])
def test_even_kl_balance_is_the_plain_kl_with_free_nats_per_step(free_avg):
    loss, kl, leaves = balanced(kl_balance=0.5, free_nats=5.0, free_avg=free_avg)
    assert 0 < (kl < 5).sum() < T * B  # some steps are free and some are not
    expected = torch.maximum(kl, torch.tensor(5.0)).mean()
    close(loss, expected)
    close_gradients(loss, expected, leaves)


def test_free_nats_are_for_the_mean_or_for_each_step():
    losses = {}
    for free_avg in (True, False):
        torch.manual_seed(5)
        losses[free_avg], kl, _ = balanced(free_nats=4.0, free_avg=free_avg)
        assert kl.min() < 4 < kl.mean()
    close(losses[True], kl.mean())
    close(losses[False], kl.clamp(min=4).mean())
    assert losses[False] > losses[True]


@pytest.mark.parametrize("free_avg", [True, False])
def test_kl_below_the_free_nats_trains_nothing(free_avg):
    loss, kl, leaves = balanced(free_nats=50.0, free_avg=free_avg)
    assert loss == 50 > kl.max()
    assert not any(grad.any() for grad in torch.autograd.grad(loss, leaves))
