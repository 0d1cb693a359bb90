"""Started by torchrun: saves the gradients of an update, each process with its share of the batch.

torchrun --nproc-per-node 2 tests/share_of_a_batch.py gradients.npz
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamerv1
import dreamerv2
import dreamerv3
import runtime

T, B, V, A = 5, 6, 4, 3
SIZES = {
    "batch_size": B, "batch_length": T, "deter": 12, "hidden": 11, "stoch": 4, "units": 10,
    "imag_horizon": 4, "cnn_depth": 2, "precision": "float32",
}  # fmt: skip
KINDS = {
    "v1 discrete": (dreamerv1, {"actor_dist": "onehot", "expl_noise": 0.0}),
    "v1 continuous": (dreamerv1, {"actor_dist": "tanh_normal"}),
    "v2 discrete": (dreamerv2, {"actor_dist": "onehot", "actor_grad": "reinforce"}),
    "v2 continuous": (dreamerv2, {"actor_dist": "trunc_normal", "actor_grad": "dynamics"}),
    "v2 free nats of each step": (
        dreamerv2,
        {"actor_dist": "onehot", "actor_grad": "both", "free_avg": False},
    ),
    "v3 discrete free nats of each step": (dreamerv3, {"actor_dist": "onehot"}),
}
# Options that not every script has.
OWN = {
    dreamerv1: {"discount_head": True},
    dreamerv2: {"discount_head": True, "classes": 5, "weight_decay": 0.0},
    dreamerv3: {"classes": 5, "blocks": 4},
}


def make(kind, **changes):
    script, options = KINDS[kind]
    return script, script.Args(**SIZES | OWN[script] | options | changes)


def make_batch():
    """Sequences that differ much, so that their KLs do."""
    rng = np.random.default_rng(3)
    scale = np.arange(1, B + 1, dtype=np.float32)[:, None]
    batch = {
        "image": rng.integers(256, size=(T, B, 1, 64, 64), dtype=np.uint8),
        "vector": rng.normal(size=(T, B, V)).astype(np.float32) * scale,
        "action": np.eye(A, dtype=np.float32)[rng.integers(A, size=(T, B))],
        "reward": rng.normal(size=(T, B)).astype(np.float32),
        "is_first": rng.random((T, B)) < 0.2,
        "is_terminal": np.float32(rng.random((T, B)) < 0.2),
    }
    return {k: torch.from_numpy(v) for k, v in batch.items()}


@contextlib.contextmanager
def without_noise():
    """Samples become modes of categoricals and means of Gaussians, in every process the same."""
    rand_like = torch.rand_like
    standard_normal = torch.distributions.normal._standard_normal
    torch.rand_like = lambda x: torch.full_like(x, 0.5)
    torch.distributions.normal._standard_normal = lambda shape, dtype, device: torch.zeros(
        shape, dtype=dtype, device=device
    )
    try:
        yield
    finally:
        torch.rand_like = rand_like
        torch.distributions.normal._standard_normal = standard_normal


def learner(kind, **changes):
    script, args = make(kind, **changes)
    torch.manual_seed(1)
    shapes = {"image": (1, 64, 64), "vector": (V,), "action": (A,)}
    agent = script.make_agent(shapes, args)
    if script is not dreamerv3:
        return script, args, agent, script.make_optimizers(agent, args)
    # Rewards and values that are not 0, as at first, and whose range differs between processes.
    with torch.no_grad():
        agent["world_model"].reward.out.weight.normal_(std=1e-3)
        agent["critic"].out.weight.normal_(std=1e-3)
    return script, args, agent, script.make_optimizer(agent, args)


def save_gradients(saved, kind, share):
    """With free nats a little below and a little above the mean KL of the whole batch."""
    whole = make_batch()
    script, _, agent, _ = learner(kind)
    rssm = agent["world_model"].rssm
    with torch.no_grad():
        embed = agent["world_model"].encoder(whole)
        post, prior = rssm.observe(embed, whole["action"], whole["is_first"])
    kl = rssm.kl(post, prior).mean(0)  # (B,)
    saved[f"{kind}, kl"] = kl.numpy()
    rates = {"model_lr": 1e-30, "actor_lr": 1e-30, "critic_lr": 1e-30}
    if script is dreamerv3:
        rates = {}  # the first step of its optimizer has rate 0
    for side, factor in (("below", 0.98), ("above", 1.02)):
        flags = rates | {"free_nats": factor * kl.mean().item()}
        script, args, agent, optimizers = learner(kind, **flags)
        script.update(agent, optimizers, share, args)
        for name, weight in agent.named_parameters():
            if weight.grad is not None:
                saved[f"{kind}, {side}, {name}"] = weight.grad.numpy()


def save_sameness(saved, kind, share):
    """Whether each process has the same networks after updates, and what noise comes next."""
    script, args, agent, optimizers = learner(kind)
    runtime.seed_process(args.seed)
    for _ in range(4):
        script.update(agent, optimizers, share, args)
    copies = runtime.all_gather([weight.detach() for weight in agent.parameters()])
    same = [all(map(torch.equal, copies[0], copy)) for copy in copies]
    saved[f"{kind}, same"] = np.array(same)
    saved[f"{kind}, noise"] = np.array(runtime.all_gather(torch.rand(()).item()))


def main(path):
    runtime.setup(1, cuda=False, deterministic=False, threads=1)
    count = B // runtime.WORLD
    first = runtime.RANK * count
    share = {k: v[:, first : first + count] for k, v in make_batch().items()}
    saved = {}
    for kind in KINDS:
        with without_noise():
            save_gradients(saved, kind, share)
        save_sameness(saved, kind, share)
    if runtime.RANK == 0:
        np.savez(path, **saved)


if __name__ == "__main__":
    with runtime.exit_on_error():
        main(sys.argv[1])
