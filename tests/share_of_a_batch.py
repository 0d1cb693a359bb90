"""Started by torchrun: saves the gradients of an update, each process with its share of the batch.

torchrun --nproc-per-node 2 tests/share_of_a_batch.py gradients.npz
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import dreamerv1
import dreamerv2

T, B, V, A = 5, 6, 4, 3
SIZES = {"batch_size": B, "batch_length": T, "deter": 12, "hidden": 11, "stoch": 4, "units": 10}
SIZES |= {"imag_horizon": 4, "precision": "float32", "discount_head": True}
KINDS = {
    "v1 discrete": (dreamerv1, {"actor_dist": "onehot", "expl_noise": 0.0}),
    "v1 continuous": (dreamerv1, {"actor_dist": "tanh_normal"}),
    "v2 discrete": (dreamerv2, {"actor_dist": "onehot", "actor_grad": "reinforce"}),
    "v2 continuous": (dreamerv2, {"actor_dist": "trunc_normal", "actor_grad": "dynamics"}),
    "v2 free nats of each step": (
        dreamerv2,
        {"actor_dist": "onehot", "actor_grad": "both", "free_avg": False},
    ),
}


def make(kind, **changes):
    script, options = KINDS[kind]
    if script is dreamerv2:
        changes |= {"classes": 5, "weight_decay": 0.0}
    return script, script.Args(**SIZES | options | changes)


def make_batch():
    """Sequences that differ much, so that their KLs do."""
    rng = np.random.default_rng(3)
    scale = np.arange(1, B + 1, dtype=np.float32)[:, None]
    batch = {
        "vector": rng.normal(size=(T, B, V)).astype(np.float32) * scale,
        "action": np.eye(A, dtype=np.float32)[rng.integers(A, size=(T, B))],
        "reward": rng.normal(size=(T, B)).astype(np.float32),
        "is_first": rng.random((T, B)) < 0.2,
        "is_terminal": np.float32(rng.random((T, B)) < 0.2),
    }
    return {k: torch.from_numpy(v) for k, v in batch.items()}


def without_noise(patched):
    """Samples become modes of categoricals and means of Gaussians, in every process the same."""
    torch.rand_like = lambda x: torch.full_like(x, 0.5) if patched else rand_like(x)
    torch.distributions.normal._standard_normal = (
        (lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device))
        if patched
        else standard_normal
    )


rand_like, standard_normal = torch.rand_like, torch.distributions.normal._standard_normal


def learner(kind, **changes):
    script, args = make(kind, **changes)
    torch.manual_seed(1)
    agent = script.make_agent({"vector": (V,), "action": (A,)}, args)
    return script, args, agent, script.make_optimizers(agent, args)


def main(path):
    common.setup(1, cuda=False, deterministic=False, threads=1)
    whole, count, rank = make_batch(), B // common.WORLD, common.RANK
    share = {k: v[:, rank * count : (rank + 1) * count] for k, v in whole.items()}
    saved, rates = {}, dict.fromkeys(("model_lr", "actor_lr", "critic_lr"), 1e-30)
    for kind in KINDS:
        without_noise(True)
        script, _, agent, _ = learner(kind)
        rssm, encoder = agent["world_model"].rssm, agent["world_model"].encoder
        with torch.no_grad():
            post, prior = rssm.observe(encoder(whole), whole["action"], whole["is_first"])
        kl = rssm.kl(post, prior).mean(0)  # (B,)
        saved[f"{kind}, kl"] = kl.numpy()
        for side, factor in (("below", 0.98), ("above", 1.02)):  # the free nats
            flags = rates | {"free_nats": factor * kl.mean().item()}
            script, args, agent, optimizers = learner(kind, **flags)
            script.update(agent, optimizers, share, args)
            for name, weight in agent.named_parameters():
                if weight.grad is not None:
                    saved[f"{kind}, {side}, {name}"] = weight.grad.numpy()
        without_noise(False)
        script, args, agent, optimizers = learner(kind)
        torch.manual_seed(100 + rank)
        for _ in range(4):
            script.update(agent, optimizers, share, args)
        copies = common.everyone([weight.detach() for weight in agent.parameters()])
        same = [all(map(torch.equal, copies[0], copy)) for copy in copies]
        noise = common.everyone(torch.rand(()).item())
        saved[f"{kind}, same"], saved[f"{kind}, noise"] = np.array(same), np.array(noise)
    if rank == 0:
        np.savez(path, **saved)


if __name__ == "__main__":
    with common.exit_on_error():
        main(sys.argv[1])
