"""DreamerV2: Hafner et al., "Mastering Atari with Discrete World Models", arXiv 2010.02193.

This is DreamerV1 with categorical latents, KL balancing, REINFORCE for discrete actions, an entropy
bonus, a slow critic and a GRU with layer norm. Where paper and code disagree we follow the code.

    python dreamerv2.py --env-id CartPole-v1                # learns in minutes on a laptop
    python dreamerv2.py --env-id PongNoFrameskip-v4         # the paper's agent

A row of experience holds an observation, the action that led to it, and what came with it:

    row           0 (reset)  1          2 (done)   3 (reset)  4
    action        0          a1         a2         0          a4
    image         o0         o1         o2         o3         o4
    reward        0          r1         r2         0          r4
    is_first      1          0          0          1          0
    is_terminal   0          0          1, or 0    0          0         0 if only time ran out

Shapes: T steps, B sequences, N = T * B imagination starts, I = horizon + 1 imagined states,
A action, E embed, D deter, S x K stoch, F feat; C, H, W image, V vector; (T, B) scalar per step.
"""

import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributions as td
from torch import nn
from torch.utils.data import default_collate as stack

import common


@dataclass
class Args:
    # --- run ---
    env_id: str = "PongNoFrameskip-v4"  # any gymnasium id or dm_control/walker-walk-v0
    exp_name: str = Path(__file__).stem  # name in the run folder
    seed: int = 1  # of networks, replay and environments
    total_frames: common.Count = 200_000_000  # env frames, action repeat included
    cuda: bool = True  # use a GPU if there is one
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU
    torch_deterministic: bool = False  # only kernels that give the same numbers each time
    threads: int = 0  # CPU threads of torch, 0 is its own choice
    graph: bool = True  # on a GPU, record acting and learning once and replay them
    compile: bool = False  # fuse the steps of the recurrent model, after minutes of compiling
    resume: str = ""  # run folder to go on with
    evaluate: str = ""  # run folder whose agent to play, without learning
    # --- environment ---
    num_envs: common.Count = 1  # environments that act at once
    async_envs: bool = False  # each in a process, or Atari in a thread, of its own
    observation: Literal["auto", "pixels", "vector", "both"] = "auto"  # auto: dm_control draws
    pixels: bool = False  # short for --observation pixels; rendered if need be
    grayscale: bool = True  # images of one channel, not three
    action_repeat: common.Count = 4  # frames per agent step
    time_limit: int = 108_000  # frames per episode, 0 is the environment's own limit
    sticky_prob: Annotated[float | None, 0, 1] = None  # Atari: chance of a repeat (.25), None by id
    full_action_space: bool = False  # Atari: all 18 actions, not only the game's
    # --- replay ---
    prefill: int = 50_000  # agent steps of random play before learning
    replay_size: common.Count = 2_000_000  # agent steps
    favor_ends: bool = True  # draw the ends of episodes more often
    batch_size: common.Count = 16  # B, sequences (published curves 50)
    batch_length: common.Count = 50  # T, agent steps
    # --- world model ---
    deter: common.Count = 600  # D, size of the GRU state
    hidden: common.Count = 600  # units between the inputs and outputs of the RSSM
    stoch: common.Count = 32  # S, number of latent variables
    classes: common.Count = 32  # K, classes of each
    cnn_depth: common.Count = 48  # channels of the first convolution
    units: common.Count = 400  # of every dense layer
    layers: common.Count = 4  # dense layers of every head
    act: Literal["elu", "relu", "silu"] = "elu"  # activation
    norm: Literal["none", "layer"] = "none"  # before activations, not in the GRU
    reward_transform: Literal["none", "tanh"] = "tanh"  # of replayed rewards
    reward_head: Literal["normal", "twohot"] = "normal"  # squared error, or 255 bins
    discount_head: bool = True  # learn where episodes end
    discount_scale: float = 5.0  # weight of its loss
    kl_scale: float = 0.1  # beta, the weight of the KL
    kl_balance: common.Share = 0.8  # alpha of Alg. 2: the share of the KL that trains the prior
    free_nats: float = 0.0  # KL that costs nothing
    free_avg: bool = True  # so for the mean over the batch, not for each step
    # --- behavior ---
    gamma: common.Share = 0.999  # discount per agent step (paper .995)
    discount_lambda: common.Share = 0.95  # lambda of the returns
    imag_horizon: Annotated[int, 2, 2**31 - 1] = 15  # imagined steps
    actor_dist: Literal["auto", "onehot", "trunc_normal", "tanh_normal"] = "auto"  # by actions
    actor_grad: Literal["auto", "reinforce", "dynamics", "both"] = "auto"  # Eq. 6, by actions
    actor_grad_mix: common.Share = 0.1  # for both: the share of dynamics (the paper's 1 - rho)
    actor_entropy: float = 1e-3  # eta of Eq. 6
    slow_update: common.Count = 100  # updates between copies of the critic
    # --- optimizers ---
    train_every: common.Count = 16  # agent steps per update (released code; the paper says 4)
    pretrain: int = 1  # updates before the schedule begins
    model_lr: common.Rate = 2e-4  # learning rate of the world model
    actor_lr: common.Rate = 4e-5  # of the actor
    critic_lr: common.Rate = 1e-4  # of the critic
    adam_eps: common.Rate = 1e-5  # epsilon of Adam
    weight_decay: float = 1e-6  # share taken off every weight per update
    clip: common.Rate = 100.0  # global norm of each optimizer's gradient
    # --- logging ---
    log_every: int = 10_000  # frames between rows of losses
    eval_every: int = 100_000  # frames between evaluations, 0 is only at the end
    eval_episodes: common.Count = 1  # episodes of an evaluation
    diagnose_every: int = 1000  # updates between looks at how far dreams hold, 0 is never
    video_every: int = 1_000_000  # frames between open-loop videos, 0 is never
    checkpoint_every: int = 500_000  # frames between checkpoints, 0 is only at the end
    capture_video: bool = False  # film how each evaluation begins
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "dreamer"  # its project
    wandb_entity: str | None = None  # its team


DMC = {
    "total_frames": 1_000_000, "action_repeat": 2, "time_limit": 1000, "reward_transform": "none",
    "grayscale": False, "prefill": 1000, "favor_ends": False, "deter": 200, "hidden": 200,
    "discount_head": False, "kl_scale": 1.0, "free_nats": 1.0, "gamma": 0.99, "actor_entropy": 1e-4,
    "train_every": 5, "pretrain": 100, "model_lr": 3e-4, "actor_lr": 8e-5, "critic_lr": 8e-5,
    "log_every": 1000, "eval_every": 10_000, "video_every": 50_000, "checkpoint_every": 50_000,
}  # fmt: skip
SMALL = {
    "total_frames": 30_000, "action_repeat": 1, "time_limit": 0, "threads": 1, "prefill": 1000,
    "batch_size": 8, "batch_length": 32, "deter": 128, "hidden": 128, "cnn_depth": 16, "units": 128,
    "layers": 2, "act": "silu", "norm": "layer", "reward_transform": "none", "train_every": 5,
    "model_lr": 1e-3, "actor_lr": 3e-4, "critic_lr": 1e-3, "log_every": 1000, "eval_every": 5000,
    "eval_episodes": 20, "video_every": 5000, "checkpoint_every": 10_000,
    "grayscale": False, "favor_ends": False, "stoch": 8, "classes": 8, "gamma": 0.99,
    "imag_horizon": 10, "slow_update": 25, "pretrain": 100, "diagnose_every": 200,
}  # fmt: skip
PRESETS = {"atari": {}, "dmc_pixels": DMC, "dmc_vector": DMC, "other": SMALL}


class LayerNorm(nn.LayerNorm):
    """In float32, since a CPU sums its gradient in the type of x: (..., U) or (N, C, H, W)."""

    def forward(self, x):
        if self.dense:
            return super().forward(x.float())
        return super().forward(x.float().movedim(1, -1)).movedim(-1, 1)  # each pixel its own


def block(layer, args):
    """A linear or convolutional layer, its norm and its activation."""
    modules = [layer, {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU}[args.act](inplace=True)]
    if args.norm == "layer":
        modules.insert(1, LayerNorm(len(layer.bias), eps=1e-3))
        modules[1].dense = isinstance(layer, nn.Linear)
    return nn.Sequential(*modules)


def mlp(inputs, layers, args):
    sizes = [inputs] + [args.units] * layers
    return nn.Sequential(*(block(nn.Linear(i, o), args) for i, o in pairwise(sizes)))


def pixels(image):
    """uint8 -> float in [-0.5, 0.5], in training and in acting."""
    return image.float() / 255 - 0.5


class Encoder(nn.Module):
    """Image and vector to one embedding: (..., C, 64, 64), (..., V) -> (..., E)."""

    def __init__(self, shapes, args):
        super().__init__()
        self.image, self.vector = shapes.get("image"), shapes.get("vector")
        self.size, d = 0, args.cnn_depth
        if self.image:
            sizes = pairwise([self.image[0], d, 2 * d, 4 * d, 8 * d])  # 64 -> 31 -> 14 -> 6 -> 2
            self.conv = nn.Sequential(*(block(nn.Conv2d(i, o, 4, 2), args) for i, o in sizes))
            self.size += 32 * d
        if self.vector:
            self.mlp = mlp(self.vector[0], args.layers, args)
            self.size += args.units

    def forward(self, obs):
        embed = []
        if self.image:
            x = self.conv(pixels(obs["image"]).flatten(0, -4))  # (T * B, 8d, 2, 2)
            embed.append(x.flatten(1).unflatten(0, obs["image"].shape[:-3]))
        if self.vector:
            embed.append(self.mlp(obs["vector"]))
        return torch.cat(embed, -1)


class Decoder(nn.Module):
    """Means of unit Gaussians: (..., F) -> dict of image (..., C, 64, 64), vector (..., V)."""

    def __init__(self, feat_size, shapes, args):
        super().__init__()
        self.image, self.vector, d = shapes.get("image"), shapes.get("vector"), args.cnn_depth
        if self.image:
            self.linear = nn.Linear(feat_size, 32 * d)
            self.conv = nn.Sequential(  # 1 -> 5 -> 13 -> 30 -> 64
                block(nn.ConvTranspose2d(32 * d, 4 * d, 5, 2), args),
                block(nn.ConvTranspose2d(4 * d, 2 * d, 5, 2), args),
                block(nn.ConvTranspose2d(2 * d, d, 6, 2), args),
                nn.ConvTranspose2d(d, self.image[0], 6, 2),
            )
        if self.vector:
            layers = mlp(feat_size, args.layers, args)
            self.mlp = nn.Sequential(layers, nn.Linear(args.units, self.vector[0]))

    def forward(self, feat):
        recon = {}
        if self.image:
            x, first = self.linear(feat).flatten(0, -2), self.conv[0][0]  # (T * B, 32d)
            # Of a 1 x 1 image, a transposed convolution is one matrix product, and faster as such.
            x = F.linear(x, first.weight.flatten(1).T, first.bias.repeat_interleave(25))
            x = self.conv[1:](self.conv[0][1:](x.unflatten(-1, first.weight.shape[1:])))
            recon["image"] = x.float().unflatten(0, feat.shape[:-1])
        if self.vector:
            recon["vector"] = self.mlp(feat).float()
        return recon


class Head(nn.Module):
    """A scalar from the features: (..., F) -> (...)."""

    def __init__(self, feat_size, layers, args):
        super().__init__()
        self.mlp, self.out = mlp(feat_size, layers, args), nn.Linear(args.units, 1)

    def forward(self, feat):
        x = self.mlp(feat).float()
        with torch.autocast(feat.device.type, enabled=False):  # bfloat16 has 95.0 and 95.5 only
            return self.out(x).squeeze(-1)

    def loss(self, feat, target):
        """-log N(target; head, 1) without its constant: (...)."""
        return 0.5 * (self(feat) - target).square()


class TwoHotHead(Head):
    """The mean of 255 bins, spaced and learned as in DreamerV3."""

    def __init__(self, feat_size, layers, args):
        super().__init__(feat_size, layers, args)
        self.out = nn.Linear(args.units, 255)
        x = torch.linspace(-20, 20, 255)
        self.register_buffer("bins", x.sign() * x.abs().expm1())  # symexp

    def forward(self, feat):
        prob = torch.softmax(super().forward(feat), -1)  # of logits (..., 255)
        # Bins of opposite sign cancel pair by pair, so that equal logits give exactly 0.
        return ((prob - prob.flip(-1))[..., 128:] * self.bins[128:]).sum(-1)

    def loss(self, feat, target):
        """Cross-entropy with the target shared between its two neighbors: (...)."""
        above = torch.searchsorted(self.bins, target).clamp(1, 254)
        low, high = self.bins[above - 1], self.bins[above]
        share = ((target - low) / (high - low)).clamp(0, 1)
        logp = torch.log_softmax(super().forward(feat), -1)
        near = torch.stack([above - 1, above], -1)
        return -(logp.gather(-1, near) * torch.stack([1 - share, share], -1)).sum(-1)


class OneHot:
    """One-hot categoricals (..., K) in float32; samples carry the straight-through gradient."""

    def __init__(self, logit):
        self.logit = logit.float()

    logits = cached_property(lambda self: torch.log_softmax(self.logit, -1))
    probs = cached_property(lambda self: self.logits.exp())  # a sample without gradient needs none
    mode = property(lambda self: self.best(self.logit))

    def best(self, score):
        return torch.zeros_like(score).scatter_(-1, score.max(-1, keepdim=True).indices, 1.0)

    def rsample(self):
        # Gumbel's trick: the best sum of logit and such noise is class k with probability p_k.
        sample = self.best(self.logit - (-torch.rand_like(self.logit).log()).log())
        return sample + (self.probs - self.probs.detach()) if self.logit.requires_grad else sample

    def log_prob(self, x):
        return (x * self.logits).sum(-1)

    def entropy(self):
        return -(self.probs * self.logits).sum(-1)


class TruncNormal:
    """Gaussians cut off outside [-1, 1], (..., A); torch has none with gradients and entropy."""

    def __init__(self, mean, std):
        self.normal, self.mode = td.Normal(mean, std), mean
        self.low, self.high = (-1 - mean) / std, (1 - mean) / std
        self.cdf_low = torch.special.ndtr(self.low)
        self.mass = torch.special.ndtr(self.high) - self.cdf_low

    def rsample(self):
        """Inverse of the distribution function, clipped with straight-through gradient."""
        p = self.cdf_low + torch.rand_like(self.mode) * self.mass
        x = self.mode + self.normal.scale * torch.special.ndtri(p.clamp(1e-6, 1 - 1e-6))
        return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()

    def log_prob(self, x):
        return (self.normal.log_prob(x) - self.mass.log()).sum(-1)

    def entropy(self):
        low, high = (x * torch.exp(-0.5 * x.square()) for x in (self.low, self.high))
        cut = (low - high) / (2 * np.sqrt(2 * np.pi) * self.mass)
        return (self.normal.entropy() + self.mass.log() + cut).sum(-1)


class TanhNormal(td.TransformedDistribution):
    """tanh of Gaussians, (..., A); its entropy and mode are found from 100 samples."""

    def __init__(self, mean, std):
        tanh = td.TanhTransform(cache_size=1)  # that keeps samples as they were before tanh
        super().__init__(td.Independent(td.Normal(mean, std), 1), tanh)

    def log_prob(self, x):  # of an action that may have been rounded to the bounds
        return super().log_prob(x.clamp(-1 + 1e-6, 1 - 1e-6))

    def entropy(self):
        return -super().log_prob(self.rsample((100,))).mean(0)

    @property
    def mode(self):
        """The most likely of 100 samples, each batch element its own."""
        x = self.rsample((100,))  # (100, ..., A)
        best = super().log_prob(x).argmax(0)[None, ..., None].expand_as(x[:1])
        return x.gather(0, best)[0]


class Actor(nn.Module):
    """Policy over actions in [-1, 1] or one-hot: (..., F) -> distribution over (..., A)."""

    def __init__(self, feat_size, action_dim, args):
        super().__init__()
        self.dist = args.actor_dist
        self.mlp, self.out = mlp(feat_size, args.layers, args), nn.Linear(args.units, action_dim)
        if self.dist != "onehot":
            self.std = nn.Linear(args.units, action_dim)

    def forward(self, feat):
        x = self.mlp(feat)
        if self.dist == "onehot":
            return OneHot(self.out(x))
        mean, std = self.out(x).float(), self.std(x).float()
        if self.dist == "trunc_normal":
            return TruncNormal(torch.tanh(mean), 2 * torch.sigmoid(std / 2) + 0.1)
        return TanhNormal(5 * torch.tanh(mean / 5), F.softplus(std) + 0.1)


class RSSM(nn.Module):
    """Recurrent state-space model (Eq. 1): a deterministic GRU path and S categoricals (Alg. 1).

    State: deter (..., D), stoch (..., S * K), logit (..., S, K).
    """

    def __init__(self, embed_size, action_dim, args):
        super().__init__()
        self.deter, self.stoch, self.classes = args.deter, args.stoch, args.classes
        self.stoch_size = stats = args.stoch * args.classes
        self.feat_size = self.stoch_size + args.deter
        self.img_in = block(nn.Linear(self.stoch_size + action_dim, args.hidden), args)
        self.gru = nn.Linear(args.hidden + args.deter, 3 * args.deter)
        self.gru_norm = nn.LayerNorm(3 * args.deter, eps=1e-3)
        self.img_out, self.obs_out = (
            nn.Sequential(block(nn.Linear(i, args.hidden), args), nn.Linear(args.hidden, stats))
            for i in (args.deter, args.deter + embed_size)
        )

    def initial(self, batch):
        """The zero state that each of B sequences starts from, without statistics."""
        zeros = self.img_out[1].bias.new_zeros
        return {"deter": zeros(batch, self.deter), "stoch": zeros(batch, self.stoch_size)}

    def feat(self, state):
        return torch.cat([state["stoch"], state["deter"]], -1)  # (..., F)

    def stats(self, x):
        """A linear layer's output as the statistics of stoch."""
        return {"logit": x.float().unflatten(-1, (self.stoch, self.classes))}

    def dist(self, stats):
        return OneHot(stats["logit"])

    def state(self, deter, x):
        """Samples stoch from the linear layer's output x."""
        stats = self.stats(x)
        stoch = self.dist(stats).rsample()
        return {"deter": deter, "stoch": stoch.flatten(-2), **stats}

    def gru_step(self, prev, action):
        """h_t = f(h_{t-1}, z_{t-1}, a_t)"""
        x = self.img_in(torch.cat([prev["stoch"], action], -1))
        parts = self.gru_norm(self.gru(torch.cat([x, prev["deter"]], -1)).float())
        reset, cand, update = parts.chunk(3, -1)  # (B, D) each, normed together
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)  # begins by keeping most of the old state
        return torch.lerp(prev["deter"], cand, update)

    def img_step(self, prev, action):
        """Prior state p(z_t | h_t), eyes closed."""
        deter = self.gru_step(prev, action)
        return self.state(deter, self.img_out(deter))

    def obs_step(self, prev, action, embed, is_first):
        """Posterior state q(z_t | h_t, x_t), eyes open."""
        keep = is_first.logical_not()[:, None].float()  # (B, 1), a new episode forgets both
        prev = {k: prev[k] * keep for k in ("deter", "stoch")}
        deter = self.gru_step(prev, action * keep)
        return self.state(deter, self.obs_out(torch.cat([deter, embed], -1)))

    def observe(self, embed, action, is_first):
        """(T, B, E), (T, B, A), (T, B) -> post, prior: dicts of (T, B, ...)."""
        is_first = torch.cat([torch.ones_like(is_first[:1]), is_first[1:]])
        state, states = self.initial(embed.shape[1]), []
        # Nothing but the recurrence is in the loop, in float32: its small products gain nothing.
        with torch.autocast(embed.device.type, enabled=False):
            for inputs in zip(action, embed.float(), is_first, strict=True):
                state = self.obs_step(state, *inputs)
                states.append(state)
        post = stack(states)
        return post, self.stats(self.img_out(post["deter"]))  # the prior is never sampled

    def imagine(self, actor, start, horizon):
        """Follows the actor from start, a dict of (N, ...), through the prior.

        -> feat: (I, N, F), action: (I, N, A), which led to it, the first one zero
        """
        state, feats, actions = start, [self.feat(start)], []
        for _ in range(horizon):
            actions.append(actor(feats[-1].detach()).rsample())  # (N, A)
            state = self.img_step(state, actions[-1])
            feats.append(self.feat(state))
        return torch.stack(feats), torch.stack([torch.zeros_like(actions[0]), *actions])

    def kl(self, post, prior):
        """KL(post || prior), summed over the S variables: (T, B)."""
        p, q = self.dist(post), self.dist(prior)
        return (p.probs * (p.logits - q.logits)).sum((-2, -1))


class WorldModel(nn.Module):
    """Encoder, RSSM, and the heads that predict observation, reward and discount."""

    def __init__(self, shapes, args):
        super().__init__()
        self.args = args
        self.encoder = Encoder(shapes, args)
        self.rssm = RSSM(self.encoder.size, shapes["action"][0], args)
        self.decoder = Decoder(self.rssm.feat_size, shapes, args)
        size, layers = self.rssm.feat_size, args.layers
        self.reward = {"normal": Head, "twohot": TwoHotHead}[args.reward_head](size, layers, args)
        self.discount = Head(size, layers, args) if args.discount_head else None

    def loss(self, batch):
        """Eq. 2: batch, a dict of (T, B, ...) -> loss (), post of (T, B, ...), metrics of ()."""
        args = self.args
        post, prior = self.rssm.observe(self.encoder(batch), batch["action"], batch["is_first"])
        feat = self.rssm.feat(post)  # (T, B, F)
        losses = {}
        for key, recon in self.decoder(feat).items():  # summed over pixels, means over T and B
            target = pixels(batch[key]) if key == "image" else batch[key]
            losses[key] = 0.5 * F.mse_loss(recon, target, reduction="sum") / feat[..., 0].numel()
        reward = torch.tanh(batch["reward"]) if args.reward_transform == "tanh" else batch["reward"]
        losses["reward"] = self.reward.loss(feat, reward).mean()
        if self.discount:
            # The soft target holds gamma: the predicted discount is not multiplied by it again.
            target = args.gamma * (1 - batch["is_terminal"])
            losses["discount"] = F.binary_cross_entropy_with_logits(self.discount(feat), target)
        losses["kl"], kl = self.kl_loss(post, prior)
        scale = {"discount": args.discount_scale, "kl": args.kl_scale}
        loss = sum(scale.get(k, 1.0) * v for k, v in losses.items())
        metrics = {f"losses/{k}": v for k, v in losses.items()} | {"losses/model": loss}
        metrics["model/kl"] = kl.mean()
        for name, state in (("post", common.detach(post)), ("prior", common.detach(prior))):
            metrics[f"model/{name}_entropy"] = self.rssm.dist(state).entropy().sum(-1).mean()
        return loss, post, common.detach(metrics)

    def kl_loss(self, post, prior):
        """Alg. 2: most of the KL trains the prior towards the posterior -> loss (), KL (T, B)."""
        free, alpha = self.args.free_nats, self.args.kl_balance
        stop = dict if alpha == 0.5 else common.detach  # the plain KL then, as the authors have it
        kl = to_post = self.rssm.kl(stop(post), prior)
        to_prior = self.rssm.kl(post, stop(prior))
        if self.args.free_avg and alpha != 0.5:
            to_post, to_prior = common.average(to_post.mean()), common.average(to_prior.mean())
        loss = alpha * to_post.clamp(min=free) + (1 - alpha) * to_prior.clamp(min=free)
        return loss.mean(), kl

    @torch.no_grad()
    def open_loop(self, batch, context=5):
        """Sees `context` steps, then dreams -> truth, model and error: (T, B, C, 3H, W)."""
        first = {k: v[:context] for k, v in batch.items()}
        state, _ = self.rssm.observe(self.encoder(first), first["action"], first["is_first"])
        states = [{k: v[t] for k, v in state.items()} for t in range(len(first["action"]))]
        for action in batch["action"][context:]:
            states.append(self.rssm.img_step(states[-1], action))
        model = self.decoder(self.rssm.feat(stack(states)))["image"] + 0.5
        truth = pixels(batch["image"]) + 0.5
        return torch.cat([truth, model, (model - truth + 1) / 2], -2)


def lambda_return(reward, value, disc, bootstrap, lambda_):
    """Eq. 4, from the last step back: (I-1, N) each, bootstrap (N,) -> (I-1, N)."""
    target = reward + disc * (1 - lambda_) * torch.cat([value[1:], bootstrap[None]])
    ret, returns = bootstrap, []
    for t in reversed(range(len(reward))):
        ret = target[t] + disc[t] * lambda_ * ret
        returns.append(ret)
    return torch.stack(returns[::-1])


def behavior_loss(world_model, actor, critic, slow_critic, post, is_terminal, args):
    """Actor and critic losses on imagined rollouts (Eqs. 4-6); is_terminal is (T, B)."""
    start = {k: v.flatten(0, 1) for k, v in common.detach(post).items()}  # (N, ...)
    with torch.set_grad_enabled(args.actor_grad != "reinforce"):
        feat, action = world_model.rssm.imagine(actor, start, args.imag_horizon)  # (I, N, ...)
        reward, value = world_model.reward(feat), slow_critic(feat)  # (I, N)
        disc = torch.full_like(reward, args.gamma)
        if world_model.discount:
            # Replay knows whether the start state was terminal, so that is not predicted.
            predicted = torch.sigmoid(world_model.discount(feat[1:]))  # gamma included
            disc = torch.cat([args.gamma * (1 - is_terminal.reshape(1, -1)), predicted])
        ret = lambda_return(reward[:-1], value[:-1], disc[:-1], value[-1], args.discount_lambda)
        weight = torch.cumprod(torch.cat([torch.ones_like(disc[:1]), disc[:-1]]), 0).detach()

    # state   z0   z1   z2   z3    With I = 4. The policy at z_i chose action[i + 1], so ret[i + 1]
    # action       a1   a2   a3    judges it. z2 chose a3, whose return is unknown: the last two
    # ret     g0   g1   g2         states train no policy, and the last one trains no critic.
    policy = actor(feat[:-2].detach())
    entropy = policy.entropy()  # (I-2, N)
    mix = {"reinforce": 0.0, "dynamics": 1.0, "both": args.actor_grad_mix}[args.actor_grad]
    objective = args.actor_entropy * entropy
    if mix < 1:
        advantage = (ret[1:] - value[:-2]).detach()
        objective = objective + (1 - mix) * policy.log_prob(action[1:-1].detach()) * advantage
    if mix > 0:
        objective = objective + mix * ret[1:]
    prediction = critic(feat[:-1].detach())  # (I-1, N)
    actor_loss = -(weight[:-2] * objective).mean()  # Eq. 6
    critic_loss = (weight[:-1] * 0.5 * (prediction - ret.detach()).square()).mean()  # Eq. 5
    metrics = {"actor_entropy": entropy, "reward": reward, "discount": disc, "return": ret}
    metrics |= {"value": prediction, "slow_value": value}
    metrics = {f"imag/{k}": v.mean() for k, v in metrics.items()}
    metrics |= {"losses/actor": actor_loss, "losses/critic": critic_loss}
    return actor_loss, critic_loss, common.detach(metrics)


def make_agent(shapes, args):
    """Fresh networks; shapes: action (A,), image (C, 64, 64) and/or vector (V,)."""
    model = WorldModel(shapes, args)
    size, action_dim = model.rssm.feat_size, shapes["action"][0]
    agent = nn.ModuleDict({"world_model": model, "actor": Actor(size, action_dim, args)})
    agent["critic"], agent["slow_critic"] = (Head(size, args.layers, args) for _ in range(2))
    for module in agent.modules():  # as Keras has it, unasked
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    if args.reward_head == "twohot":
        nn.init.zeros_(model.reward.out.weight)  # the outer bins are huge: begin at 0
    agent["slow_critic"].requires_grad_(False)
    return agent


def make_optimizers(agent, args):
    """One Adam each, of its own learning rate."""
    adam = partial(torch.optim.AdamW, eps=args.adam_eps, fused=True, capturable=True)
    rates = {"world_model": args.model_lr, "actor": args.actor_lr, "critic": args.critic_lr}
    decay = {k: args.weight_decay / lr for k, lr in rates.items()}  # AdamW multiplies it by lr
    return {k: adam(agent[k].parameters(), rates[k], weight_decay=decay[k]) for k in rates}


def update(agent, optimizers, batch, args):
    """Learns from a batch, a dict of (T, B, ...) -> metrics: dict of ()."""
    device, bfloat16 = batch["reward"].device.type, args.precision == "bfloat16"
    autocast = torch.autocast(device, torch.bfloat16, enabled=bfloat16)
    with autocast:
        model_loss, post, metrics = agent["world_model"].loss(batch)
    metrics["grad_norm/model"] = common.opt_step(optimizers["world_model"], model_loss, args.clip)
    with autocast:  # imagines with the model after its step, from states before it
        *losses, imagined = behavior_loss(*agent.values(), post, batch["is_terminal"], args)
    for name, loss in zip(("actor", "critic"), losses, strict=True):
        metrics[f"grad_norm/{name}"] = common.opt_step(optimizers[name], loss, args.clip)
    return metrics | imagined


@torch.no_grad()
def policy(agent, row, state, sample=True):
    """Acts on a row, a dict of (N, ...), after a state -> action (N, A), state."""
    rssm, embed = agent["world_model"].rssm, agent["world_model"].encoder(row)
    state = rssm.obs_step(state, row["action"], embed, row["is_first"])
    dist = agent["actor"](rssm.feat(state))
    action = dist.rsample() if sample else dist.mode  # the latent state is always sampled
    return action, {k: state[k] for k in ("deter", "stoch")}


def main(args):
    config = asdict(args) | {"resume": ""}
    device = common.setup(args.seed, args.cuda, args.torch_deterministic, args.threads)
    args.observation = "pixels" if args.pixels else args.observation
    options = "env_id seed observation grayscale action_repeat time_limit sticky_prob"
    options = {k: getattr(args, k) for k in (*options.split(), "full_action_space")}
    count = min(args.eval_episodes, 10)  # of environments with seeds of their own
    eval_envs = common.make_envs(count, first_index=10_000, render=args.capture_video, **options)
    shapes, discrete = eval_envs.shapes, eval_envs.discrete
    auto = {"precision": "bfloat16" if device.type == "cuda" else "float32"}
    auto |= {"actor_dist": "onehot" if discrete else "trunc_normal"}
    auto |= {"actor_grad": "reinforce" if discrete else "dynamics"}
    vars(args).update({k: v for k, v in auto.items() if getattr(args, k) == "auto"})
    if discrete != (args.actor_dist == "onehot"):
        raise common.UserError(f"--actor-dist {args.actor_dist} is not for {args.env_id}'s actions")
    agent = make_agent({k: shape for k, (shape, _) in shapes.items()}, args).to(device)
    parts = {"agent": agent, **make_optimizers(agent, args)}
    rssm, open_loop = agent["world_model"].rssm, agent["world_model"].open_loop
    if args.compile:
        rssm.obs_step, rssm.img_step = map(torch.compile, (rssm.obs_step, rssm.img_step))
    record = partial(common.Captured, device=device, enabled=args.graph)
    play = record(partial(policy, agent, sample=False)), rssm.initial(count)
    evaluate = partial(common.evaluate, eval_envs, *play, args.eval_episodes, args.capture_video)
    if args.evaluate:
        common.load_checkpoint(args.evaluate, parts)
        returns, film = evaluate()
        print(f"return {returns.mean():.1f} +- {returns.std():.1f} in {len(returns)} episodes")
        return common.save_gif(Path(args.evaluate, "videos/evaluate.gif"), film) if film else None

    steps = args.total_frames // args.action_repeat
    width, share = args.num_envs * common.WORLD, -(-args.batch_size // common.WORLD)
    rows = min(args.replay_size, int(1.05 * steps) + 1000) // width  # resets take rows too
    if args.batch_length > min(rows, args.prefill // width):
        raise common.UserError(f"--batch-length {args.batch_length} > --prefill or --replay-size")
    gib = args.num_envs * sum(np.empty(*shape).nbytes for shape in shapes.values()) / 2**30  # a row
    run = common.own_folder(args.resume or common.new_run(config, rows * gib))
    replay = common.Replay(run / "replay", rows, shapes, args.num_envs, args.seed, device)
    parts["replay"] = replay
    saved = common.load_checkpoint(args.resume, parts) if args.resume else {}
    step, updates, before, seconds, size, episodes = saved.get("counters", (0, 0, 0, 0.0, 0, None))
    frames = step * args.action_repeat
    envs = common.make_envs(args.num_envs, args.async_envs, episodes=episodes, **options)
    sizes = ", ".join(f"{k} {sum(p.numel() for p in v.parameters()):,}" for k, v in agent.items())
    print(f"{args.env_id} on {device} in {args.precision}, run folder {run}")
    print(f"parameters: {sizes}; replay {replay.capacity:,} rows, {replay.capacity * gib:.2f} GiB")
    logger = common.Logger(run, config, frames, seconds, size)
    guard, metrics = common.FiniteGuard(), saved.get("metrics", {})
    act, learn = record(partial(policy, agent)), record(partial(update, agent, parts, args=args))
    row, state, done = None, rssm.initial(args.num_envs), np.ones(args.num_envs, bool)
    pool, pending = ThreadPool(1), None  # a step that has been sent to the environments

    def save():
        log = (time.time() - logger.began, logger.file.tell())
        more = {"counters": (step, updates, before, *log, envs.keys[:, 2].tolist())}
        common.save_checkpoint(run, parts, more | {"metrics": metrics | guard.check()})

    with common.Interrupt() as interrupt:
        while not interrupt.agreed() or pending:
            # A turn of the loop is an update, as long as one is due, or else half a step.
            due = args.pretrain + 1 + (step - args.prefill) // args.train_every
            learns = step >= args.prefill and len(replay) >= args.batch_length
            now = pending or not args.async_envs or step >= steps  # learns while others act
            if learns and updates < due and now and not interrupt.code:
                batch = replay.sample(share, args.batch_length, args.favor_ends)
                metrics = learn(batch)
                guard.watch(updates, metrics)
                if updates % args.slow_update == 0:
                    agent["slow_critic"].load_state_dict(agent["critic"].state_dict())
                updates += 1
                if common.crossed(updates - 1, updates, args.diagnose_every):
                    logger.diagnose(frames, updates, agent, batch, args)
                continue

            if pending:
                (row, done, info), pending = pending(), None
                replay.add(row)
                taken, ended = common.tally(row, done, info)  # of all processes
                step += taken  # a reset costs no frame
                frames = step * args.action_repeat
                logger.bar.update(frames - before)
                for episode in ended:
                    logger.log(episode, frames, updates)
                continue

            last, crossed = step >= steps, partial(common.crossed, before, frames)
            if metrics and learns and "image" in shapes and crossed(args.video_every):
                logger.gif("open_loop", open_loop(replay.sample(6, args.batch_length)), frames)
            if (last and frames > before) or (updates and crossed(args.eval_every)):
                returns, film = evaluate()
                logger.log({"eval/episodic_return": returns.mean()}, frames, updates)
                if film:
                    logger.gif("eval/episode", film, frames)
            if metrics and frames > before and (last or crossed(args.log_every)):
                more = guard.check() | {"replay/rows": len(replay)}
                logger.log(metrics | more, frames, updates)
            before = frames
            if last:
                break
            if crossed(args.checkpoint_every):
                save()

            if done.all() or not learns:
                action = common.random_actions(envs, replay.rng)
            else:
                action, state = act(row, state)
                action = action.cpu().numpy()
            pending = partial(common.step_rows, envs, action, done)
            pending = pool.apply_async(pending).get if args.async_envs else pending

    save()
    if interrupt.code:
        print(f"go on with: {common.LAUNCHER} {__file__} --resume {run} --env-id {args.env_id}")
    for closing in (logger, eval_envs, pool):
        closing.close()
    envs.close(terminate=True)  # asks nothing of a process that may be dead
    raise SystemExit(interrupt.code)


if __name__ == "__main__":
    with common.exit_on_error():
        main(common.parse_args(Args, PRESETS))
