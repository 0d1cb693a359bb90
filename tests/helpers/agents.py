"""Small agents of every script, of sizes that are all different, and batches to learn from."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import dreamerv1
import dreamerv2
import dreamerv3

T, B, A, V, C = 6, 4, 3, 12, 1
N = T * B
D, S, K, HIDDEN, UNITS, LAYERS, DEPTH, HORIZON = 10, 7, 5, 13, 11, 2, 2, 8
SHAPES = {"image": (C, 64, 64), "vector": (V,)}
SIZES = {
    "deter": D, "hidden": HIDDEN, "stoch": S, "units": UNITS, "layers": LAYERS,
    "cnn_depth": DEPTH, "imag_horizon": HORIZON, "free_nats": 0.0,
}  # fmt: skip
OWN = {  # options that only one script has
    dreamerv1: {"reward_layers": 1, "discount_layers": 3, "critic_layers": 4, "cnn_act": "elu"},
    dreamerv2: {"classes": K},
    dreamerv3: {"classes": K, "blocks": 2},
}
SCRIPTS = {script.__name__: script for script in OWN}
every_script = pytest.mark.parametrize("script", OWN, ids=SCRIPTS)
TWINS = {name: script for name, script in SCRIPTS.items() if script is not dreamerv3}
both_twins = pytest.mark.parametrize("script", TWINS.values(), ids=TWINS)
# The gradients by which the actor of a script learns.
GRADIENTS = [(dreamerv1, "dynamics"), (dreamerv1, "reinforce")]
GRADIENTS += [(dreamerv2, "dynamics"), (dreamerv2, "reinforce"), (dreamerv2, "both")]
every_gradient = pytest.mark.parametrize(
    ("script", "grad"), GRADIENTS, ids=[f"{script.__name__}-{grad}" for script, grad in GRADIENTS]
)


def make(script, keys=("vector",), discrete=False, **options):
    """A small agent, with its script, args, rssm and each of its networks by name."""
    args = script.Args(**SIZES | OWN[script] | options)
    script.resolve_auto(args, torch.device("cpu"), discrete)
    agent = script.make_agent({k: SHAPES[k] for k in keys} | {"action": (A,)}, args)
    rssm = agent["world_model"].rssm
    return SimpleNamespace(script=script, args=args, agent=agent, rssm=rssm, **dict(agent.items()))


def make_batch(keys=("vector",), discrete=False, steps=T):
    """An episode ends in the middle of sequence 1, another one with sequence 3."""
    batch = {
        "image": torch.randint(0, 256, (steps, B, C, 64, 64), dtype=torch.uint8),
        "vector": torch.randn(steps, B, V),
        "action": torch.tanh(torch.randn(steps, B, A)),
        "reward": 3 * torch.randn(steps, B),
        "is_first": torch.zeros(steps, B),
        "is_terminal": torch.zeros(steps, B),
    }
    if discrete:
        batch["action"] = F.one_hot(torch.randint(A, (steps, B)), A).float()
    batch["is_terminal"][2, 1] = batch["is_first"][3, 1] = batch["is_terminal"][-1, 3] = 1
    batch["action"][3, 1] = batch["reward"][3, 1] = 0
    return {k: v for k, v in batch.items() if k in keys or k not in SHAPES}


def row_of(batch, t):
    return {k: v[t] for k, v in batch.items()}


def random_state(x, *size):
    return {"deter": torch.randn(*size, D), "stoch": torch.randn(*size, x.rssm.stoch_size)}


def observe(x, batch):
    """-> post, prior"""
    return x.rssm.observe(x.world_model.encoder(batch), batch["action"], batch["is_first"])


def behave(x, batch, seed=9):
    """The posterior of a batch and the behavior loss on it, each with noise of the seed."""
    torch.manual_seed(seed)
    post = x.world_model.loss(batch)[1]
    torch.manual_seed(seed)
    networks = x.agent.values()  # world model, actor, critic and whatever follows
    return post, x.script.behavior_loss(*networks, post, batch["is_terminal"], x.args)


def make_optimizers(x):
    """What the script's `update` takes: one optimizer, or a dict of them."""
    make = getattr(x.script, "make_optimizers", None) or x.script.make_optimizer
    return make(x.agent, x.args)


def update(x, batch, optimizers=None):
    return x.script.update(x.agent, optimizers or make_optimizers(x), batch, x.args)


def one_update(script, discrete=False, **options):
    """The metrics of a first update, from the same seed whatever the options."""
    torch.manual_seed(1)
    batch = make_batch(discrete=discrete)
    torch.manual_seed(2)
    x = make(script, discrete=discrete, **options)
    torch.manual_seed(3)
    metrics = {k: float(v) for k, v in update(x, batch).items()}
    assert all(math.isfinite(v) for v in metrics.values()), metrics
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in x.agent.parameters())
    return metrics


def copied(tensors):
    return {k: v.clone() for k, v in tensors.items()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def close(a, b, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_dtype=False)


def close_gradients(a, b, leaves, atol=1e-6):
    """Two scalars have the same gradients at the leaves -> these gradients, 0 if unconnected."""
    zeros = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    ours, theirs = (torch.autograd.grad(x, leaves, **zeros) for x in (a, b))
    for x, y in zip(ours, theirs, strict=True):
        close(x, y, rtol=1e-3, atol=atol)
    return ours
