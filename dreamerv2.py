"""DreamerV2: Hafner et al., "Mastering Atari with Discrete World Models", arXiv 2010.02193.

This is DreamerV1 with categorical latents and straight-through gradients, KL balancing, REINFORCE
for discrete actions, an entropy bonus, a slow critic, and a GRU with layer norm. Where the paper
and the authors' released code disagree, the code made the published curves, so we follow it.

    python dreamerv2.py --env-id CartPole-v1                # learns in minutes on a laptop
    python dreamerv2.py --env-id PongNoFrameskip-v4         # the paper's agent

A row of experience holds an observation and what came with it; the action is the one that led to it:

    row           0 (reset)  1          2 (done)   3 (reset)  4
    action        0          a1         a2         0          a4
    image         o0         o1         o2         o3         o4
    reward        0          r1         r2         0          r4
    is_first      1          0          0          1          0
    is_terminal   0          0          1 or 0     0          0       0 if only time ran out

Shapes: T steps, B sequences, N = T * B imagination starts, I = horizon + 1 imagined states, A action,
E embed, D deter, S x K stoch, F feat, C, H, W image, V vector. A scalar per step is (T, B).
"""

import functools
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import common  # first of the imports that are not Python's own: it checks the version
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Args:
    # --- run ---
    env_id: str = "PongNoFrameskip-v4"  # any gymnasium id, or dm_control/walker-walk-v0; it chooses the preset
    exp_name: str = Path(__file__).stem  # name in the run folder
    seed: int = 1  # of the networks, the replay and the environments
    total_frames: int = 200_000_000  # env frames, action repeat included
    cuda: bool = True  # use a GPU if there is one
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU
    torch_deterministic: bool = False  # only deterministic kernels
    threads: int = 0  # CPU threads of torch, 0 leaves its own choice
    resume: str = ""  # run folder to go on with
    evaluate: str = ""  # run folder whose agent to play, without learning
    # --- environment ---
    num_envs: int = 1  # environments that act at once
    async_envs: bool = False  # each environment in a process of its own
    observation: Literal["auto", "pixels", "vector", "both"] = "auto"  # pixels are rendered if need be
    pixels: bool = False  # short for --observation pixels
    grayscale: bool = True  # images of one channel
    action_repeat: int = 4  # frames per agent step
    time_limit: int = 108_000  # frames per episode, 0 leaves the environment's own limit
    sticky_prob: float | None = None  # Atari: probability of a repeated action (paper 0.25); none: the id's own
    full_action_space: bool = False  # Atari: all 18 actions, as in the paper
    # --- replay ---
    prefill: int = 50_000  # agent steps of random play before learning
    replay_size: int = 2_000_000  # agent steps
    favor_ends: bool = True  # draw episode ends more often
    batch_size: int = 16  # B, sequences (published curves: 50)
    batch_length: int = 50  # T, steps
    # --- world model ---
    deter: int = 600  # D, size of the GRU state
    hidden: int = 600  # units between the RSSM's inputs and outputs
    stoch: int = 32  # S, number of latent variables
    classes: int = 32  # K, classes of each; 0 makes them Gaussian
    cnn_depth: int = 48  # channels of the first convolution
    units: int = 400  # of every dense layer
    layers: int = 4  # of every dense head
    act: Literal["elu", "relu", "silu"] = "elu"  # activation
    norm: Literal["none", "layer"] = "none"  # normalization before it; the GRU always has its layer norm
    reward_transform: Literal["none", "tanh"] = "tanh"  # of replayed rewards
    reward_head: Literal["normal", "twohot"] = "normal"  # squared error, or cross-entropy over bins
    discount_head: bool = True  # learn where episodes end
    discount_scale: float = 5.0  # weight of its loss
    kl_scale: float = 0.1  # beta of Eq. 2
    kl_balance: float = 0.8  # alpha of Alg. 2: the share of the KL that trains the prior
    free_nats: float = 0.0  # KL below this is free
    free_avg: bool = True  # compare the mean KL with it, not each step's
    # --- behavior ---
    gamma: float = 0.999  # discount (paper 0.995)
    discount_lambda: float = 0.95  # lambda of Eq. 4
    imag_horizon: int = 15  # imagined steps
    actor_dist: Literal["auto", "onehot", "trunc_normal", "tanh_normal"] = "auto"  # auto: onehot or trunc_normal
    actor_grad: Literal["auto", "reinforce", "dynamics", "both"] = "auto"  # Eq. 6; auto: dynamics if continuous
    actor_grad_mix: float = 0.1  # for both: the share of dynamics (the paper's 1 - rho)
    actor_entropy: float = 1e-3  # eta of Eq. 6
    slow_update: int = 100  # updates between copies of the critic
    # --- optimizers ---
    train_every: int = 16  # agent steps per update (released code; the paper says 4)
    pretrain: int = 1  # updates when learning begins
    model_lr: float = 2e-4  # learning rate of the world model
    actor_lr: float = 4e-5  # of the actor
    critic_lr: float = 1e-4  # of the critic
    adam_eps: float = 1e-5  # epsilon of Adam
    weight_decay: float = 1e-6  # taken off every weight at each step, whatever the learning rate
    clip: float = 100.0  # global gradient norm, each optimizer its own
    # --- logging ---
    log_every: int = 10_000  # frames between rows of losses
    eval_every: int = 100_000  # frames between evaluations, 0 for only the last one
    eval_episodes: int = 1  # episodes of one evaluation
    video_every: int = 1_000_000  # frames between open-loop videos
    checkpoint_every: int = 500_000  # frames between checkpoints
    capture_video: bool = False  # film an episode of each evaluation
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "dreamer"  # its project
    wandb_entity: str | None = None  # its team


DMC = dict(
    total_frames=1_000_000, action_repeat=2, time_limit=1000, grayscale=False, prefill=1000, favor_ends=False,
    deter=200, hidden=200, reward_transform="none", discount_head=False, kl_scale=1.0, free_nats=1.0,
    gamma=0.99, actor_entropy=1e-4, train_every=5, pretrain=100, model_lr=3e-4, actor_lr=8e-5, critic_lr=8e-5,
    log_every=1000, eval_every=10_000, video_every=50_000, checkpoint_every=50_000,
)  # fmt: skip
PRESETS = {
    "atari": {},
    "dmc_pixels": DMC,
    "dmc_vector": DMC,
    "other": dict(
        total_frames=30_000, action_repeat=1, time_limit=0, grayscale=False, prefill=1000, favor_ends=False,
        batch_size=16, batch_length=32, deter=128, hidden=128, stoch=8, classes=8, cnn_depth=16, units=128, layers=2,
        reward_transform="none", kl_scale=0.1, gamma=0.99, imag_horizon=10,
        train_every=4, pretrain=100, model_lr=1e-3, actor_lr=3e-4, critic_lr=3e-4, threads=1,
        log_every=1000, eval_every=5000, eval_episodes=20, video_every=5000, checkpoint_every=10_000,
    ),
}  # fmt: skip


# Networks. Keras's defaults are part of the published agent: Glorot-uniform weights, zero biases, norms with eps 1e-3.

ACTS = {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU}


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W), each pixel its own."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def init_weights(module):
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def dense(inputs, outputs, args):
    """A linear layer, its norm and its activation."""
    norm = [nn.LayerNorm(outputs, eps=1e-3)] if args.norm == "layer" else []
    return nn.Sequential(nn.Linear(inputs, outputs), *norm, ACTS[args.act]())


def mlp(inputs, args):
    return nn.Sequential(*(dense(args.units if i else inputs, args.units, args) for i in range(args.layers)))


def conv(layer, args):
    """A convolution, its norm and its activation."""
    norm = [ChannelNorm(layer.out_channels, eps=1e-3)] if args.norm == "layer" else []
    return nn.Sequential(layer, *norm, ACTS[args.act]())


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
            channels = [self.image[0], d, 2 * d, 4 * d, 8 * d]  # 64 -> 31 -> 14 -> 6 -> 2
            pairs = zip(channels[:-1], channels[1:], strict=True)
            self.conv = nn.Sequential(*(conv(nn.Conv2d(i, o, 4, stride=2), args) for i, o in pairs))
            self.size += 32 * d
        if self.vector:
            self.mlp = mlp(self.vector[0], args)
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
    """Means of image and vector, both with unit variance: (..., F) -> dict of (..., C, 64, 64), (..., V)."""

    def __init__(self, feat_size, shapes, args):
        super().__init__()
        self.image, self.vector, d = shapes.get("image"), shapes.get("vector"), args.cnn_depth
        if self.image:
            self.linear = nn.Linear(feat_size, 32 * d)
            self.conv = nn.Sequential(  # 1 -> 5 -> 13 -> 30 -> 64
                conv(nn.ConvTranspose2d(32 * d, 4 * d, 5, stride=2), args),
                conv(nn.ConvTranspose2d(4 * d, 2 * d, 5, stride=2), args),
                conv(nn.ConvTranspose2d(2 * d, d, 6, stride=2), args),
                nn.ConvTranspose2d(d, self.image[0], 6, stride=2),
            )
        if self.vector:
            self.mlp = nn.Sequential(mlp(feat_size, args), nn.Linear(args.units, self.vector[0]))

    def forward(self, feat):
        recon = {}
        if self.image:
            x = self.linear(feat).flatten(0, -2)[:, :, None, None]  # (T * B, 32d, 1, 1)
            recon["image"] = self.conv(x).float().unflatten(0, feat.shape[:-1])
        if self.vector:
            recon["vector"] = self.mlp(feat).float()
        return recon


class Head(nn.Module):
    """A scalar from the features: (..., F) -> (...)."""

    def __init__(self, feat_size, args):
        super().__init__()
        self.mlp, self.out = mlp(feat_size, args), nn.Linear(args.units, 1)

    def forward(self, feat):
        return self.out(self.mlp(feat)).squeeze(-1).float()

    def loss(self, feat, target):
        """-log N(target; head, 1) without its constant: (...)."""
        return 0.5 * (self(feat) - target).square()


class TwoHotHead(Head):
    """A scalar as the mean of 255 bins, spaced as in DreamerV3 and learned by two-hot cross-entropy."""

    def __init__(self, feat_size, args):
        super().__init__(feat_size, args)
        self.out = nn.Linear(args.units, 255)
        x = torch.linspace(-20, 20, 255)
        self.register_buffer("bins", x.sign() * x.abs().expm1())  # symexp

    def forward(self, feat):
        prob = torch.softmax(self.out(self.mlp(feat)).float(), -1)
        # Bins of opposite sign cancel pair by pair, so that equal logits give exactly 0.
        return ((prob - prob.flip(-1))[..., 128:] * self.bins[128:]).sum(-1)

    def loss(self, feat, target):
        target = target.clamp(self.bins[0], self.bins[-1])
        above = torch.searchsorted(self.bins, target.contiguous()).clamp(1, 254)
        low, high = self.bins[above - 1], self.bins[above]
        share = ((target - low) / (high - low))[..., None]
        logp = torch.log_softmax(self.out(self.mlp(feat)).float(), -1)
        below, above = logp.gather(-1, above[..., None] - 1), logp.gather(-1, above[..., None])
        return -((1 - share) * below + share * above).squeeze(-1)


# Distributions, in float32 under any precision


class OneHot:
    """One-hot categoricals (..., K); samples carry the straight-through gradient of Alg. 1."""

    def __init__(self, logit):
        self.logp = torch.log_softmax(logit.float(), -1)

    def rsample(self):
        gumbel = -torch.empty_like(self.logp).exponential_().log()
        sample = self.one_hot((self.logp + gumbel).argmax(-1))
        prob = self.logp.exp()
        return sample + (prob - prob.detach())

    def one_hot(self, index):
        return F.one_hot(index, self.logp.shape[-1]).to(self.logp)

    @property
    def mode(self):
        return self.one_hot(self.logp.argmax(-1))

    def log_prob(self, x):
        return (self.logp * x).sum(-1)

    def entropy(self):
        return -(self.logp.exp() * self.logp).sum(-1)

    def kl(self, other):
        return (self.logp.exp() * (self.logp - other.logp)).sum(-1)


class Normal:
    """Independent Gaussians (...)."""

    def __init__(self, mean, std):
        self.mean, self.std = mean.float(), std.float()

    def rsample(self):
        return self.mean + self.std * torch.randn_like(self.mean)

    def log_prob(self, x):
        return -0.5 * ((x - self.mean) / self.std).square() - self.std.log() - 0.5 * math.log(2 * math.pi)

    def entropy(self):
        return self.std.log() + 0.5 * math.log(2 * math.pi * math.e)

    def kl(self, other):
        square = (self.std.square() + (self.mean - other.mean).square()) / (2 * other.std.square())
        return (other.std / self.std).log() + square - 0.5


class TruncNormal:
    """Gaussians cut off outside [-1, 1], (..., A); densities and entropies are exact and joint over A."""

    def __init__(self, mean, std):
        self.mean, self.std = mean.float(), std.float()
        self.low, self.high = (-1 - self.mean) / self.std, (1 - self.mean) / self.std
        self.cdf_low, self.cdf_high = torch.special.ndtr(self.low), torch.special.ndtr(self.high)
        self.mass = self.cdf_high - self.cdf_low

    def rsample(self):
        """Inverse of the distribution function; clipped with straight-through gradient."""
        p = self.cdf_low + torch.rand_like(self.mean) * self.mass
        x = self.mean + self.std * torch.special.ndtri(p.clamp(1e-6, 1 - 1e-6))
        return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()

    @property
    def mode(self):
        return self.mean

    def log_prob(self, x):
        return (Normal(self.mean, self.std).log_prob(x) - self.mass.log()).sum(-1)

    def entropy(self):
        pdf_low, pdf_high = (torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi) for x in (self.low, self.high))
        cut = (self.low * pdf_low - self.high * pdf_high) / (2 * self.mass)
        return (Normal(self.mean, self.std).entropy() + self.mass.log() + cut).sum(-1)


class TanhNormal:
    """tanh of Gaussians, (..., A); log_prob is joint over A, entropy and mode are found from 100 samples."""

    def __init__(self, mean, std):
        self.normal = Normal(mean, std)

    def rsample(self):
        return torch.tanh(self.normal.rsample())

    def log_prob(self, x):
        return self.log_prob_before_tanh(torch.atanh(x.clamp(-1 + 1e-6, 1 - 1e-6)))

    def log_prob_before_tanh(self, x):
        slope = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2)
        return (self.normal.log_prob(x) - slope).sum(-1)

    def samples(self):
        """Before tanh: (100, ..., A)."""
        return self.normal.mean + self.normal.std * torch.randn(100, *self.normal.mean.shape, device=self.normal.mean.device)

    @property
    def mode(self):
        """The most likely of 100 samples, each batch element its own."""
        x = self.samples()
        best = self.log_prob_before_tanh(x).argmax(0)
        return torch.tanh(x.gather(0, best[None, ..., None].expand(1, *x.shape[1:])).squeeze(0))

    def entropy(self):
        return -self.log_prob_before_tanh(self.samples()).mean(0)


class Actor(nn.Module):
    """Policy over actions in [-1, 1] or one-hot: (..., F) -> distribution over (..., A)."""

    def __init__(self, feat_size, action_dim, args):
        super().__init__()
        self.dist = args.actor_dist
        self.mlp, self.out = mlp(feat_size, args), nn.Linear(args.units, action_dim)
        if self.dist != "onehot":
            self.std = nn.Linear(args.units, action_dim)

    def forward(self, feat):
        x = self.mlp(feat)
        if self.dist == "onehot":
            return OneHot(self.out(x))
        mean, std = self.out(x).float(), self.std(x).float()
        if self.dist == "tanh_normal":
            return TanhNormal(5 * torch.tanh(mean / 5), F.softplus(std) + 0.1)
        return TruncNormal(torch.tanh(mean), 2 * torch.sigmoid(std / 2) + 0.1)


class RSSM(nn.Module):
    """Recurrent state-space model (Eq. 1): a deterministic GRU path and S categorical variables.

    A state is a dict of deter (..., D), stoch (..., S * K) and the statistics of stoch:
    logit (..., S, K), or mean and std (..., S) if the latents are Gaussian.
    """

    def __init__(self, embed_size, action_dim, args):
        super().__init__()
        self.deter, self.stoch, self.classes, self.action_dim = args.deter, args.stoch, args.classes, action_dim
        self.stoch_size = args.stoch * max(1, args.classes)
        self.feat_size = self.stoch_size + args.deter
        stats = args.stoch * (args.classes or 2)
        self.img_in = dense(self.stoch_size + action_dim, args.hidden, args)
        self.gru = nn.Linear(args.hidden + args.deter, 3 * args.deter)
        self.gru_norm = nn.LayerNorm(3 * args.deter, eps=1e-3)
        self.img_out = nn.Sequential(dense(args.deter, args.hidden, args), nn.Linear(args.hidden, stats))
        self.obs_out = nn.Sequential(dense(args.deter + embed_size, args.hidden, args), nn.Linear(args.hidden, stats))

    def initial(self, batch):
        """The zero state that every sequence starts from: deter (B, D), stoch (B, S * K)."""
        zeros = self.gru_norm.weight.new_zeros
        return {"deter": zeros(batch, self.deter), "stoch": zeros(batch, self.stoch_size)}

    def feat(self, state):
        return torch.cat([state["stoch"], state["deter"]], -1)  # (..., F)

    def stats(self, x):
        """Statistics of stoch from a linear layer: (..., S * K) -> dict of (..., S, K), or two of (..., S)."""
        if self.classes:
            return {"logit": x.float().unflatten(-1, (self.stoch, self.classes))}
        mean, std = x.float().chunk(2, -1)
        return {"mean": mean, "std": 2 * torch.sigmoid(std / 2) + 0.1}

    def dist(self, stats):
        return OneHot(stats["logit"]) if self.classes else Normal(stats["mean"], stats["std"])

    def state(self, deter, x):
        """Samples stoch from the linear layer's output x."""
        stats = self.stats(x)
        stoch = self.dist(stats).rsample()
        return {"deter": deter, "stoch": stoch.flatten(-2) if self.classes else stoch, **stats}

    def gru_step(self, prev, action):
        """h_t = f(h_{t-1}, z_{t-1}, a_t): a GRU with layer norm over its three parts at once."""
        x = self.img_in(torch.cat([prev["stoch"], action], -1))
        parts = self.gru_norm(self.gru(torch.cat([x, prev["deter"]], -1)).float())
        reset, cand, update = parts.chunk(3, -1)  # (B, D) each
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)  # begins by keeping most of the old state
        return update * cand + (1 - update) * prev["deter"]

    def img_step(self, prev, action):
        """Prior state p(z_t | h_t), eyes closed."""
        deter = self.gru_step(prev, action)
        return self.state(deter, self.img_out(deter))

    def obs_step(self, prev, action, embed, is_first):
        """Posterior state q(z_t | h_t, x_t), eyes open."""
        keep = (1 - is_first)[:, None]  # (B, 1), a new episode forgets the last state and action
        prev = {k: prev[k] * keep for k in ("deter", "stoch")}
        deter = self.gru_step(prev, action * keep)
        return self.state(deter, self.obs_out(torch.cat([deter, embed], -1)))

    def observe(self, embed, action, is_first):
        """Posterior states of sequences that start from zero: (T, B, E), (T, B, A), (T, B) -> post, prior.

        Only the recurrence is in the loop: the prior's statistics follow at once, and are never sampled.
        """
        state, states = self.initial(embed.shape[1]), []
        for t in range(len(embed)):
            state = self.obs_step(state, action[t], embed[t], is_first[t])
            states.append(state)
        post = stack(states)
        return post, self.stats(self.img_out(post["deter"]))

    def imagine(self, actor, start, horizon):
        """Follows the actor through the prior; action[i] is the one that led to state i.

        start: dict of (N, ...)
        -> states: dict of (I, N, ...), action: (I, N, A) with action[0] zero
        """
        states, actions = [start], [start["deter"].new_zeros(len(start["deter"]), self.action_dim)]
        for _ in range(horizon):
            actions.append(actor(self.feat(states[-1]).detach()).rsample())  # (N, A)
            states.append(self.img_step(states[-1], actions[-1]))
        return stack(states), torch.stack(actions)

    def kl(self, post, prior):
        """KL(post || prior), summed over the S variables: (T, B)."""
        return self.dist(post).kl(self.dist(prior)).sum(-1)


def stack(states):
    return {k: torch.stack([s[k] for s in states]) for k in states[0]}


def detach(state):
    return {k: v.detach() for k, v in state.items()}


class WorldModel(nn.Module):
    """Encoder, RSSM, and the heads that predict observation, reward and discount."""

    def __init__(self, shapes, action_dim, args):
        super().__init__()
        self.args, self.shapes = args, shapes
        self.encoder = Encoder(shapes, args)
        self.rssm = RSSM(self.encoder.size, action_dim, args)
        self.decoder = Decoder(self.rssm.feat_size, shapes, args)
        self.reward = (TwoHotHead if args.reward_head == "twohot" else Head)(self.rssm.feat_size, args)
        self.discount = Head(self.rssm.feat_size, args) if args.discount_head else None

    def loss(self, batch):
        """Eq. 2: batch is a dict of (T, B, ...) -> loss (), post: dict of (T, B, ...), metrics: dict of ()."""
        args = self.args
        is_first = torch.cat([torch.ones_like(batch["is_first"][:1]), batch["is_first"][1:]])
        post, prior = self.rssm.observe(self.encoder(batch), batch["action"], is_first)
        feat = self.rssm.feat(post)  # (T, B, F)
        losses = {}
        for key, recon in self.decoder(feat).items():  # summed over pixels, means over T and B
            target = pixels(batch[key]) if key == "image" else batch[key]
            losses[key] = 0.5 * F.mse_loss(recon, target, reduction="sum") / is_first.numel()
        reward = torch.tanh(batch["reward"]) if args.reward_transform == "tanh" else batch["reward"]
        losses["reward"] = self.reward.loss(feat, reward).mean()
        if self.discount:
            # The soft target holds gamma, so the predicted discount is never multiplied by it again.
            target = args.gamma * (1 - batch["is_terminal"])
            losses["discount"] = F.binary_cross_entropy_with_logits(self.discount(feat), target)
        losses["kl"], kl = self.kl_loss(post, prior)
        scale = {"discount": args.discount_scale, "kl": args.kl_scale}
        loss = sum(scale.get(k, 1.0) * v for k, v in losses.items())
        metrics = {f"losses/{k}": v for k, v in {"model": loss, **losses}.items()}
        metrics["model/kl"] = kl.mean()
        metrics["model/post_entropy"] = self.rssm.dist(detach(post)).entropy().sum(-1).mean()
        metrics["model/prior_entropy"] = self.rssm.dist(detach(prior)).entropy().sum(-1).mean()
        return loss, post, {k: v.detach() for k, v in metrics.items()}

    def kl_loss(self, post, prior):
        """Alg. 2: most of the KL trains the prior towards the posterior -> loss (), KL (T, B)."""
        args = self.args
        if args.kl_balance == 0.5:  # the plain KL, as the authors have it
            kl = self.rssm.kl(post, prior)
            return kl.clamp(min=args.free_nats).mean(), kl
        to_post, to_prior = self.rssm.kl(detach(post), prior), self.rssm.kl(post, detach(prior))
        if args.free_avg:
            free = [kl.mean().clamp(min=args.free_nats) for kl in (to_post, to_prior)]
        else:
            free = [kl.clamp(min=args.free_nats).mean() for kl in (to_post, to_prior)]
        return args.kl_balance * free[0] + (1 - args.kl_balance) * free[1], to_post

    @torch.no_grad()
    def open_loop(self, batch, context=5):
        """Watches `context` steps, then dreams on with the recorded actions -> truth, model, error (T, B, C, 3H, W)."""
        first = {k: v[:context] for k, v in batch.items()}
        state, _ = self.rssm.observe(self.encoder(first), first["action"], first["is_first"])
        states = [{k: v[t] for k, v in state.items()} for t in range(context)]
        for action in batch["action"][context:]:
            states.append(self.rssm.img_step(states[-1], action))
        model = self.decoder(self.rssm.feat(stack(states)))["image"] + 0.5
        truth = pixels(batch["image"]) + 0.5
        return torch.cat([truth, model, (model - truth + 1) / 2], -2)


def lambda_return(reward, value, disc, bootstrap, lambda_):
    """Eq. 4, from the last step back: (I-1, N) each, bootstrap (N,) -> (I-1, N)."""
    next_value = torch.cat([value[1:], bootstrap[None]])
    target = reward + disc * (1 - lambda_) * next_value
    ret, returns = bootstrap, []
    for t in reversed(range(len(reward))):
        ret = target[t] + disc[t] * lambda_ * ret
        returns.append(ret)
    return torch.stack(returns[::-1])


def behavior_loss(world_model, actor, critic, slow_critic, post, is_terminal, args):
    """Actor and critic losses on imagined rollouts (Eqs. 4-6); is_terminal is (T, B)."""
    start = {k: v.detach().flatten(0, 1) for k, v in post.items()}  # (N, ...)
    with common.frozen(world_model, slow_critic), torch.set_grad_enabled(args.actor_grad != "reinforce"):
        states, action = world_model.rssm.imagine(actor, start, args.imag_horizon)
        feat = world_model.rssm.feat(states)  # (I, N, F)
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
    metrics = {
        "losses/actor": actor_loss,
        "losses/critic": critic_loss,
        "imag/actor_entropy": entropy.mean(),
        "imag/reward": reward.mean(),
        "imag/discount": disc.mean(),
        "imag/return": ret.mean(),
        "imag/value": prediction.mean(),
        "imag/slow_value": value.mean(),
    }
    return actor_loss, critic_loss, {k: v.detach() for k, v in metrics.items()}


def make_agent(shapes, action_dim, args):
    """world_model, actor, critic and slow_critic for observations of these shapes, with fresh weights."""
    world_model = WorldModel(shapes, action_dim, args)
    feat_size = world_model.rssm.feat_size
    agent = nn.ModuleDict(dict(world_model=world_model, actor=Actor(feat_size, action_dim, args)))
    agent["critic"], agent["slow_critic"] = Head(feat_size, args), Head(feat_size, args)
    agent.apply(init_weights)
    if args.reward_head == "twohot":
        nn.init.zeros_(world_model.reward.out.weight)  # its outer bins are huge, so it begins at exactly 0
    agent["slow_critic"].requires_grad_(False)
    return agent


def make_optimizers(agent, args):
    """Adam for model, actor and critic; AdamW scales its decay with the learning rate, the paper does not."""
    rates = {"world_model": args.model_lr, "actor": args.actor_lr, "critic": args.critic_lr}
    return {
        k: torch.optim.AdamW(agent[k].parameters(), lr, eps=args.adam_eps, weight_decay=args.weight_decay / lr, fused=True)
        for k, lr in rates.items()
    }


def update(agent, optimizers, batch, updates, args):
    """One update of everything on a batch, a dict of (T, B, ...) -> metrics: dict of ()."""
    world_model, actor, critic, slow_critic = agent.values()
    with torch.autocast(batch["reward"].device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
        model_loss, post, metrics = world_model.loss(batch)
    metrics["grad_norm/model"] = common.opt_step(optimizers["world_model"], model_loss, args.clip)
    with torch.autocast(batch["reward"].device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
        # Behavior is learned in the model as it is after its step, from the states before it.
        actor_loss, critic_loss, more = behavior_loss(
            world_model, actor, critic, slow_critic, post, batch["is_terminal"], args
        )
    metrics["grad_norm/actor"] = common.opt_step(optimizers["actor"], actor_loss, args.clip)
    metrics["grad_norm/critic"] = common.opt_step(optimizers["critic"], critic_loss, args.clip)
    if updates % args.slow_update == 0:
        slow_critic.load_state_dict(critic.state_dict())
    return metrics | more


@torch.no_grad()
def policy(agent, row, state, sample=True):
    """Acts on a row of N environments -> action (N, A), state; evaluation takes the mode of the action.

    row: dict of (N, ...) arrays; its action is the one that led to its observation
    """
    world_model, actor, *_ = agent.values()
    device = next(actor.parameters()).device
    row = {k: torch.as_tensor(v).to(device) for k, v in row.items()}
    state = state or world_model.rssm.initial(len(row["reward"]))
    state = world_model.rssm.obs_step(state, row["action"], world_model.encoder(row), row["is_first"])
    dist = actor(world_model.rssm.feat(state))
    return (dist.rsample() if sample else dist.mode).cpu().numpy(), state


def main(args):
    device = common.setup(args.seed, args.cuda, args.torch_deterministic, args.threads)
    if args.precision == "auto":
        args.precision = "bfloat16" if device.type == "cuda" else "float32"
    saved = common.load_checkpoint(args.resume or args.evaluate, device) if args.resume or args.evaluate else None
    make_envs = functools.partial(
        common.make_envs,
        env_id=args.env_id,
        observation="pixels" if args.pixels else args.observation,
        grayscale=args.grayscale,
        action_repeat=args.action_repeat,
        time_limit=args.time_limit,
        sticky_prob=args.sticky_prob,
        full_action_space=args.full_action_space,
    )
    eval_envs = make_envs(
        min(args.eval_episodes, 10), seed=args.seed, first_index=10_000, render=args.capture_video
    )
    shapes = {k: space.shape for k, space in eval_envs.single_observation_space.items()}
    action_dim, discrete = common.num_actions(eval_envs)
    if args.actor_dist == "auto":
        args.actor_dist = "onehot" if discrete else "trunc_normal"
    if (args.actor_dist == "onehot") != discrete:
        raise common.UserError(f"--actor-dist {args.actor_dist} does not fit {eval_envs.single_action_space}")
    if args.actor_grad == "auto":
        args.actor_grad = "reinforce" if discrete else "dynamics"
    agent = make_agent(shapes, action_dim, args).to(device)
    optimizers = make_optimizers(agent, args)
    if saved:
        agent.load_state_dict(saved["agent"])

    def evaluate(frames, logger=None):
        act = functools.partial(policy, agent, sample=False)
        returns, lengths, film = common.evaluate(eval_envs, act, args.eval_episodes, args.capture_video)
        if logger:
            logger.log({"eval/episodic_return": returns.mean(), "eval/episodic_length": lengths.mean()}, frames, updates)
            if film:
                logger.gif("eval/episode", np.stack(film), frames)
        return returns

    if args.evaluate:
        returns = evaluate(0)
        print(f"{args.env_id}: {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes")
        return

    episodes = saved["episodes"] if saved else np.zeros(args.num_envs, np.int64)
    envs = make_envs(args.num_envs, args.async_envs, seed=args.seed, episodes=episodes)
    shapes = common.replay_shapes(envs)
    steps = args.total_frames // args.action_repeat
    rows = min(args.replay_size, int(1.05 * steps) + 1000) // args.num_envs  # resets take rows too
    if args.batch_length > min(rows, args.prefill // args.num_envs):
        raise common.UserError(f"--batch-length {args.batch_length} is longer than --prefill or --replay-size give each environment")
    size = common.check_disk("runs", shapes, rows * args.num_envs)
    run = Path(args.resume) if args.resume else common.new_run(asdict(args))
    replay = common.Replay(run / "replay", rows, shapes, args.num_envs, args.seed, saved and saved["replay"])
    step, updates, seconds = (saved[k] for k in ("step", "updates", "seconds")) if saved else (0, 0, 0.0)
    if saved:
        for k, optimizer in optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][k])
        torch.set_rng_state(saved["torch_rng"].cpu())
    rng = np.random.default_rng(args.seed)
    logger = common.Logger(run, asdict(args), args.total_frames, step * args.action_repeat, seconds, args.track)
    sizes = {k: common.count(sum(p.numel() for p in m.parameters())) for k, m in agent.items()}
    print(f"{args.env_id} with preset {common.preset_name(args.env_id, args.observation)}, run folder {run}")
    print(f"device {device} ({args.precision}), parameters {sizes}, replay {size / 2**30:.2f} GiB on disk")

    interrupt, guard = common.Interrupt(), common.FiniteGuard()
    row, done, state = common.reset_rows(envs), np.zeros(args.num_envs, bool), None
    replay.add(row)
    episodes = episodes + 1

    def save():
        guard.check()
        replay.flush()
        common.save_checkpoint(run, dict(
            agent=agent.state_dict(), optimizers={k: o.state_dict() for k, o in optimizers.items()},
            step=step, updates=updates, seconds=logger.seconds, episodes=episodes.tolist(),
            replay=replay.state_dict(), torch_rng=torch.get_rng_state(),
        ))

    while step * args.action_repeat < args.total_frames and not interrupt.code:
        if step < args.prefill:
            action = common.random_actions(envs, rng)
        else:
            action, state = policy(agent, row, state)
        before, reset = step * args.action_repeat, done
        row, done, info = common.step_rows(envs, action, done)
        replay.add(row)
        step += int((~reset).sum())
        episodes += reset
        frames = step * args.action_repeat
        for ret, length in common.finished(info):
            logger.log({"charts/episodic_return": ret, "charts/episodic_length": length}, frames, updates)
            logger.progress(frames, ret=ret)
        logger.progress(frames)

        due = args.pretrain + 1 + (step - args.prefill) // args.train_every if step >= args.prefill else 0
        while updates < due:
            batch = replay.sample(args.batch_size, args.batch_length, args.favor_ends)
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            metrics = update(agent, optimizers, batch, updates, args)
            guard.watch(updates, metrics)
            updates += 1
        if common.crossed(before, frames, args.log_every) and updates:
            guard.check()
            logger.log(metrics, frames, updates)
        if common.crossed(before, frames, args.eval_every):
            evaluate(frames, logger)
        if common.crossed(before, frames, args.checkpoint_every):
            save()
    save()


if __name__ == "__main__":
    with common.exit_on_error():
        main(common.parse_args(Args, PRESETS))
