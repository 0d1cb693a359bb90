"""DreamerV2: Hafner et al., "Mastering Atari with Discrete World Models", arXiv 2010.02193.

This is DreamerV1 with categorical latents, KL balancing, REINFORCE for discrete actions, an
entropy bonus, a slow critic and a GRU with layer norm. Where paper and code disagree we follow
the code.

    python dreamerv2.py --env-id CartPole-v1                # learns in minutes on a laptop
    python dreamerv2.py --env-id PongNoFrameskip-v4         # at full size

A row of experience holds an observation, the action that led to it, and what came with it:

    row           0 (reset)  1          2 (done)   3 (reset)  4
    action        0          a1         a2         0          a4
    image         o0         o1         o2         o3         o4
    reward        0          r1         r2         0          r4
    is_first      1          0          0          1          0
    is_terminal   0          0          1, or 0    0          0         0 if only time ran out

Shapes: T steps, B sequences, N = T * B imagination starts (when acting, N environments),
I = horizon + 1 imagined states, A action, E embed, D deter, S x K stoch, F feat, U units; C, H, W
image, V vector. A scalar per step is (T, B).
"""

import math
import sys
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import distributions as td
from torch import nn

import common
import runtime
from runtime import Count, Rate, Share, UserError, Weight, Whole


@dataclass
class Args:  # Count 1, 2, ...; Whole 0, 1, ...; Rate > 0; Weight >= 0; Share in [0, 1]
    # --- run ---
    env_id: str = "PongNoFrameskip-v4"  # any gymnasium id or dm_control/DOMAIN-TASK-v0
    # defaults for a family of environments; auto: by id
    preset: Literal["auto", "atari", "dmc_pixels", "dmc_vector", "other"] = "auto"
    exp_name: str = Path(__file__).stem  # part of a run folder's name
    seed: Whole = 1  # seed of networks, replay and environments
    total_frames: Count = 200_000_000  # env frames, action repeat included
    cuda: bool = True  # use a GPU if there is one
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if a GPU has it
    torch_deterministic: bool = False  # only kernels that give the same numbers each time
    threads: Whole = 0  # CPU threads of torch, at most one per core; 0 is its own choice
    graph: bool = True  # on a GPU, acting and learning become CUDA graphs
    compile: bool = False  # fuse the steps of the recurrent model, after minutes of compiling
    resume: str = ""  # run folder to go on with, or to begin in if it is missing or empty
    evaluate: str = ""  # run folder whose agent to play, without learning
    # --- environment ---
    env_kwargs: str = "{}"  # keywords of the environment, in JSON, as {"g": 5}
    num_envs: Count = 1  # environments that act at once
    async_envs: bool = False  # each environment in a process of its own
    # what to learn from; auto: images of dm_control, elsewhere all that the environment gives
    observation: Literal["auto", "pixels", "vector", "both"] = "auto"
    pixels: bool = False  # learn from images, rendered if need be
    grayscale: bool = True  # images of one channel, not three
    action_repeat: Count = 4  # frames per agent step
    time_limit: Whole = 108_000  # frames per episode, 0 is the environment's own limit
    # Atari: chance of the last action again; None is that of the id
    sticky_prob: Annotated[float | None, 0, 1] = None
    full_action_space: bool = False  # Atari: all 18 actions, not only the game's
    # --- replay ---
    prefill: Whole = 50_000  # agent steps of random play before learning
    replay_size: Count = 2_000_000  # rows that are kept, resets included
    favor_ends: bool = True  # draw the ends of episodes more often
    batch_size: Count = 16  # B, sequences in a batch (Atari's published curves: 50)
    batch_length: Annotated[int, 2, 2**31 - 1] = 50  # T, agent steps of a sequence
    # --- world model ---
    deter: Count = 600  # D, size of the GRU state
    hidden: Count = 600  # units of dense layers inside the RSSM
    stoch: Count = 32  # S, number of latent variables
    classes: Count = 32  # K, classes of each latent variable
    cnn_depth: Count = 48  # channels of the first convolution
    units: Count = 400  # units of dense layers outside the RSSM
    layers: Count = 4  # dense layers of heads and actor, and of vectors in and out
    act: Literal["elu", "relu", "silu"] = "elu"  # activation of hidden layers
    norm: Literal["none", "layer"] = "none"  # norm before activations; the GRU always has one
    reward_transform: Literal["none", "tanh"] = "tanh"  # what is done to rewards before the loss
    reward_head: Literal["normal", "twohot"] = "normal"  # what predicts rewards; twohot: 255 bins
    discount_head: bool = True  # learn where episodes end
    discount_scale: Weight = 5.0  # weight of the discount loss
    vector_scale: Weight = 1.0  # weight of the loss of vectors
    kl_scale: Weight = 0.1  # beta, the weight of the KL
    # alpha of Alg. 2: the share of the KL that trains the prior; .5 trains both sides in full
    kl_balance: Share = 0.8
    free_nats: Weight = 0.0  # nats of KL that cost nothing
    free_avg: bool = True  # apply free nats to the mean over the batch, not to each step
    # --- behavior ---
    gamma: Share = 0.999  # discount per agent step (paper .995)
    discount_lambda: Share = 0.95  # lambda of the returns
    imag_horizon: Annotated[int, 2, 2**31 - 1] = 15  # imagined steps
    # the policy's distribution; auto: by the kind of actions
    actor_dist: Literal["auto", "onehot", "trunc_normal", "tanh_normal"] = "auto"
    # what trains the actor, Eq. 6; auto: by the kind of actions
    actor_grad: Literal["auto", "reinforce", "dynamics", "both"] = "auto"
    actor_grad_mix: Share = 0.1  # share of dynamics if both (the paper's 1 - rho)
    actor_entropy: Weight = 1e-3  # eta of Eq. 6, the weight of the entropy
    slow_update: Count = 100  # updates between copies of the critic
    # --- optimizers ---
    train_every: Count = 16  # agent steps per update (Atari: the paper says 4)
    pretrain: Whole = 1  # updates before the schedule begins
    model_lr: Rate = 2e-4  # learning rate of the world model
    actor_lr: Rate = 4e-5  # learning rate of the actor
    critic_lr: Rate = 1e-4  # learning rate of the critic
    adam_eps: Rate = 1e-5  # epsilon of Adam
    weight_decay: Weight = 1e-6  # share taken off every weight per update
    clip: Rate = 100.0  # what each optimizer's gradient norm is cut to
    # --- logging ---
    log_every: Whole = 10_000  # frames between rows of losses, 0 is only at the end
    eval_every: Whole = 100_000  # frames between evaluations, 0 is only at the end
    eval_episodes: Count = 1  # episodes of an evaluation
    eval_envs: Whole = 10  # environments to evaluate in, at most; 0 takes those of training
    video_every: Whole = 1_000_000  # frames between open-loop videos, 0 is never
    checkpoint_every: Whole = 500_000  # frames between checkpoints, 0 is none in between
    capture_video: bool = False  # film an episode of each evaluation
    track: bool = False  # log to Weights & Biases as well
    wandb_project_name: str = "dreamer"  # project in Weights & Biases
    wandb_entity: str | None = None  # team in Weights & Biases


# What each preset changes; the defaults above are those for Atari.
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
    "model_lr": 5e-4, "actor_lr": 1e-4, "critic_lr": 5e-4, "vector_scale": 100.0,
    "log_every": 1000, "eval_every": 1000, "eval_episodes": 20, "video_every": 5000,
    "checkpoint_every": 10_000,
    "grayscale": False, "favor_ends": False, "stoch": 8, "classes": 8, "gamma": 0.99,
    "imag_horizon": 20, "actor_entropy": 1e-2, "slow_update": 25, "pretrain": 100,
}  # fmt: skip
PRESETS = {"atari": {}, "dmc_pixels": DMC, "dmc_vector": DMC, "other": SMALL}


class LayerNorm(nn.LayerNorm):
    """Norm in float32, because a CPU would sum bfloat16 gradients in bfloat16.

    x: (..., U), or images (batch, C, H, W) with a norm over the channels of each pixel.
    """

    def __init__(self, size, channels_first):
        super().__init__(size, eps=1e-3)
        self.channels_first = channels_first

    def forward(self, x):
        if self.channels_first:
            return super().forward(x.float().movedim(1, -1)).movedim(-1, 1)
        return super().forward(x.float())


def block(layer, args):
    """A linear or convolutional layer, its norm and its activation."""
    dense = isinstance(layer, nn.Linear)
    modules = [layer]
    if args.norm == "layer":
        modules.append(LayerNorm(len(layer.bias), channels_first=not dense))
    activation = {"elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU}[args.act]
    modules.append(activation(inplace=True))
    return nn.Sequential(*modules)


def mlp(inputs, layers, args):
    """Dense layers: (..., inputs) -> (..., U)."""
    sizes = [inputs] + [args.units] * layers
    return nn.Sequential(*(block(nn.Linear(i, o), args) for i, o in pairwise(sizes)))


def pixels(image):
    """uint8 -> float in [-0.5, 0.5], in training and in acting."""
    return image.float() / 255 - 0.5


class Encoder(nn.Module):
    """Image and vector to one embedding: (..., C, 64, 64), (..., V) -> (..., E)."""

    def __init__(self, shapes, args):
        super().__init__()
        self.image = shapes.get("image")
        self.vector = shapes.get("vector")
        self.size = 0  # E
        d = args.cnn_depth
        if self.image:
            channels = pairwise([self.image[0], d, 2 * d, 4 * d, 8 * d])  # at 64, 31, 14, 6, 2
            self.conv = nn.Sequential(*(block(nn.Conv2d(i, o, 4, 2), args) for i, o in channels))
            self.size += 8 * d * 2 * 2
        if self.vector:
            self.mlp = mlp(self.vector[0], args.layers, args)
            self.size += args.units

    def forward(self, obs):
        embed = []
        if self.image:
            x = self.conv(pixels(obs["image"]).flatten(0, -4))  # (batch, 8d, 2, 2)
            embed.append(x.flatten(1).unflatten(0, obs["image"].shape[:-3]))
        if self.vector:
            embed.append(self.mlp(obs["vector"]))
        return torch.cat(embed, -1)


class PixelDeconv(nn.ConvTranspose2d):
    """A transposed convolution of one pixel, which is one matrix product and faster as such."""

    def forward(self, x):
        """(batch, C, 1, 1) -> (batch, out, kernel, kernel)."""
        weight = self.weight.flatten(1)  # (C, out * kernel * kernel)
        bias = self.bias.repeat_interleave(self.weight[0, 0].numel())
        return F.linear(x.flatten(1), weight.T, bias).unflatten(-1, self.weight.shape[1:])


class Decoder(nn.Module):
    """Means of unit Gaussians: (..., F) -> dict of image (..., C, 64, 64), vector (..., V)."""

    def __init__(self, feat_size, shapes, args):
        super().__init__()
        self.image = shapes.get("image")
        self.vector = shapes.get("vector")
        d = args.cnn_depth
        if self.image:
            self.linear = nn.Linear(feat_size, 32 * d)
            self.conv = nn.Sequential(  # 1 -> 5 -> 13 -> 30 -> 64
                block(PixelDeconv(32 * d, 4 * d, 5, 2), args),
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
            x = self.linear(feat).flatten(0, -2)[:, :, None, None]  # (batch, 32d, 1, 1)
            recon["image"] = self.conv(x).float().unflatten(0, feat.shape[:-1])
        if self.vector:
            recon["vector"] = self.mlp(feat).float()
        return recon


class Head(nn.Module):
    """A scalar from the features, for the discount its logit: (..., F) -> (...)."""

    def __init__(self, feat_size, layers, args):
        super().__init__()
        self.mlp = mlp(feat_size, layers, args)
        self.out = nn.Linear(args.units, 1)

    def forward(self, feat):
        x = self.mlp(feat).float()
        # In float32: bfloat16 would round a value of 95 to steps of 0.5.
        with torch.autocast(feat.device.type, enabled=False):
            return self.out(x).squeeze(-1)

    def loss(self, feat, target):
        """-log N(target; head, 1) without its constant: (...)."""
        return 0.5 * (self(feat) - target).square()


class TwoHotHead(Head):
    """The mean of 255 bins, spaced and learned as in DreamerV3."""

    def __init__(self, feat_size, layers, args):
        super().__init__(feat_size, layers, args)
        self.out = nn.Linear(args.units, 255)
        below = -torch.linspace(20, 0, 128).expm1()  # symexp of -20, ..., 0
        self.register_buffer("bins", torch.cat([below, -below[:-1].flip(0)]))

    def forward(self, feat):
        prob = torch.softmax(super().forward(feat), -1)  # of logits (..., 255)
        # Bins k and 254 - k are opposite and cancel, so that equal logits give exactly 0.
        return ((prob - prob.flip(-1))[..., 128:] * self.bins[128:]).sum(-1)

    def loss(self, feat, target):
        """Cross-entropy with the target shared between its two neighbors: (...)."""
        above = torch.searchsorted(self.bins, target).clamp(1, 254)
        low = self.bins[above - 1]
        high = self.bins[above]
        share = ((target - low) / (high - low)).clamp(0, 1)
        logp = torch.log_softmax(super().forward(feat), -1)
        near = torch.stack([above - 1, above], -1)
        return -(logp.gather(-1, near) * torch.stack([1 - share, share], -1)).sum(-1)


class OneHot:
    """One-hot categoricals (..., K) in float32; samples carry the straight-through gradient."""

    def __init__(self, logit):
        self.logit = logit.float()

    @cached_property
    def logp(self):
        return torch.log_softmax(self.logit, -1)

    @cached_property
    def probs(self):
        return self.logp.exp()

    @property
    def mode(self):
        return self.one_hot(self.logit)

    def one_hot(self, score):
        """The class of the highest score."""
        return torch.zeros_like(score).scatter_(-1, score.max(-1, keepdim=True).indices, 1.0)

    def rsample(self):
        # Gumbel's trick: the best sum of logit and such noise is class k with probability p_k.
        noise = -(-torch.rand_like(self.logit).log()).log()
        sample = self.one_hot(self.logit + noise)
        if self.logit.requires_grad:  # straight-through: adds 0, with the gradient of probs
            sample = sample + (self.probs - self.probs.detach())
        return sample

    def log_prob(self, x):
        return (x * self.logp).sum(-1)

    def entropy(self):
        return -(self.probs * self.logp).sum(-1)


class TruncNormal:
    """Gaussians cut off outside [-1, 1], (..., A), with gradients and entropy."""

    def __init__(self, mean, std):
        self.normal = td.Normal(mean, std)
        self.mode = mean
        self.low = (-1 - mean) / std
        self.high = (1 - mean) / std
        self.cdf_low = torch.special.ndtr(self.low)
        self.mass = torch.special.ndtr(self.high) - self.cdf_low

    def rsample(self):
        """Inverse of the distribution function, clipped with straight-through gradient."""
        p = self.cdf_low + torch.rand_like(self.mass) * self.mass
        x = self.normal.loc + self.normal.scale * torch.special.ndtri(p.clamp(1e-6, 1 - 1e-6))
        return x + (x.clamp(-1 + 1e-6, 1 - 1e-6) - x).detach()

    def log_prob(self, x):
        return (self.normal.log_prob(x) - self.mass.log()).sum(-1)

    def entropy(self):
        low = self.low * torch.exp(-0.5 * self.low.square())
        high = self.high * torch.exp(-0.5 * self.high.square())
        cut = (low - high) / (2 * math.sqrt(2 * math.pi) * self.mass)
        return (self.normal.entropy() + self.mass.log() + cut).sum(-1)


class TanhNormal(td.TransformedDistribution):
    """tanh of Gaussians, (..., A); its entropy and mode are found from 100 samples."""

    def __init__(self, mean, std):
        tanh = td.TanhTransform(cache_size=1)  # it remembers what samples were before tanh
        super().__init__(td.Independent(td.Normal(mean, std), 1), tanh)

    def log_prob(self, x):
        # An action may have been rounded to a bound, where atanh is infinite.
        return super().log_prob(x.clamp(-1 + 1e-6, 1 - 1e-6))

    def entropy(self):
        return -super().log_prob(self.rsample((100,))).mean(0)

    @property
    def mode(self):
        """The most likely of 100 samples, each batch element its own."""
        x = self.rsample((100,))  # (100, ..., A)
        best = super().log_prob(x).argmax(0)[None, ..., None]  # (1, ..., 1)
        return x.take_along_dim(best, 0)[0]


class Actor(nn.Module):
    """Policy over actions in [-1, 1] or one-hot: (..., F) -> distribution over (..., A)."""

    def __init__(self, feat_size, action_dim, args):
        super().__init__()
        self.dist = args.actor_dist
        self.mlp = mlp(feat_size, args.layers, args)
        self.out = nn.Linear(args.units, action_dim)
        if self.dist != "onehot":
            self.std = nn.Linear(args.units, action_dim)

    def forward(self, feat):
        x = self.mlp(feat)
        if self.dist == "onehot":
            return OneHot(self.out(x))
        mean = self.out(x).float()
        std = self.std(x).float()
        if self.dist == "trunc_normal":
            return TruncNormal(torch.tanh(mean), 2 * torch.sigmoid(std / 2) + 0.1)
        return TanhNormal(5 * torch.tanh(mean / 5), F.softplus(std) + 0.1)


def stack(states):
    """T dicts of (B, ...) -> a dict of (T, B, ...)."""
    return {k: torch.stack([state[k] for state in states]) for k in states[0]}


def detach(tensors):
    return {k: v.detach() for k, v in tensors.items()}


class RSSM(nn.Module):
    """Recurrent state-space model (Eq. 1): a deterministic GRU path and S categoricals.

    State: deter (..., D), stoch (..., S * K), logit (..., S, K).
    """

    def __init__(self, embed_size, action_dim, args):
        super().__init__()
        self.deter = args.deter
        self.stoch = args.stoch
        self.classes = args.classes
        self.stoch_size = args.stoch * args.classes
        self.feat_size = self.stoch_size + args.deter
        stats_size = self.stoch_size
        self.img_in = block(nn.Linear(self.stoch_size + action_dim, args.hidden), args)
        self.gru = nn.Linear(args.hidden + args.deter, 3 * args.deter)
        self.gru_norm = nn.LayerNorm(3 * args.deter, eps=1e-3)
        self.img_out = nn.Sequential(
            block(nn.Linear(args.deter, args.hidden), args), nn.Linear(args.hidden, stats_size)
        )
        self.obs_out = nn.Sequential(
            block(nn.Linear(args.deter + embed_size, args.hidden), args),
            nn.Linear(args.hidden, stats_size),
        )

    def initial(self, batch):
        """The zero state that each of B sequences starts from, without statistics."""
        device = next(self.parameters()).device
        return {
            "deter": torch.zeros(batch, self.deter, device=device),
            "stoch": torch.zeros(batch, self.stoch_size, device=device),
        }

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
        """h_t = f(h_{t-1}, z_{t-1}, a_t); the papers write a_{t-1} for this action."""
        x = self.img_in(torch.cat([prev["stoch"], action], -1))
        parts = self.gru_norm(self.gru(torch.cat([x, prev["deter"]], -1)).float())
        reset, cand, update = parts.chunk(3, -1)  # (B, D) each, normed together
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)  # begins by keeping most of the old state
        return torch.lerp(prev["deter"], cand, update)  # (1 - update) * old + update * cand

    def img_step(self, prev, action):
        """Prior state p(z_t | h_t), eyes closed."""
        deter = self.gru_step(prev, action)
        return self.state(deter, self.img_out(deter))

    def obs_step(self, prev, action, embed, is_first):
        """Posterior state q(z_t | h_t, x_t), eyes open."""
        # A new episode forgets the state and the action before it.
        keep = is_first.logical_not()[:, None].float()  # (B, 1)
        prev = {k: prev[k] * keep for k in ("deter", "stoch")}
        deter = self.gru_step(prev, action * keep)
        return self.state(deter, self.obs_out(torch.cat([deter, embed], -1)))

    def observe(self, embed, action, is_first):
        """(T, B, E), (T, B, A), (T, B) -> post, prior: dicts of (T, B, ...)."""
        # What came before the window is not known: its first row counts as a reset.
        is_first = torch.cat([torch.ones_like(is_first[:1]), is_first[1:]])
        state = self.initial(embed.shape[1])
        states = []
        # Only the recurrence is in the loop, in float32: bfloat16 would not make it faster.
        with torch.autocast(embed.device.type, enabled=False):
            for inputs in zip(action, embed.float(), is_first, strict=True):
                state = self.obs_step(state, *inputs)
                states.append(state)
        post = stack(states)
        # The prior of a step has the same deter; the KL needs its statistics alone, no sample.
        return post, self.stats(self.img_out(post["deter"]))

    def imagine(self, actor, start, horizon):
        """Follows the actor from start, a dict of (N, ...), through the prior.

        -> feat: (I, N, F), action: (I, N, A), which led to it, the first one zero
        """
        state = start
        feats = [self.feat(start)]
        actions = []
        for _ in range(horizon):
            # What the actor sees is cut off: gradients reach it through its actions alone.
            actions.append(actor(feats[-1].detach()).rsample())  # (N, A)
            state = self.img_step(state, actions[-1])
            feats.append(self.feat(state))
        return torch.stack(feats), torch.stack([torch.zeros_like(actions[0]), *actions])

    def kl(self, post, prior):
        """KL(post || prior), summed over the S variables: (T, B)."""
        p = self.dist(post)
        q = self.dist(prior)
        return (p.probs * (p.logp - q.logp)).sum((-2, -1))


class WorldModel(nn.Module):
    """Encoder, RSSM, and the heads that predict observation, reward and discount."""

    def __init__(self, shapes, args):
        super().__init__()
        self.args = args
        self.encoder = Encoder(shapes, args)
        self.rssm = RSSM(self.encoder.size, shapes["action"][0], args)
        self.decoder = Decoder(self.rssm.feat_size, shapes, args)
        size = self.rssm.feat_size
        reward_head = TwoHotHead if args.reward_head == "twohot" else Head
        self.reward = reward_head(size, args.layers, args)
        self.discount = Head(size, args.layers, args) if args.discount_head else None

    def loss(self, batch):
        """Eq. 2: batch, a dict of (T, B, ...) -> loss (), post (T, B, ...), metrics."""
        args = self.args
        post, prior = self.rssm.observe(self.encoder(batch), batch["action"], batch["is_first"])
        feat = self.rssm.feat(post)  # (T, B, F)
        rows = batch["reward"].numel()  # T * B
        losses = {}
        for key, recon in self.decoder(feat).items():
            # -log N(target; recon, 1) without its constant: sum over pixels, mean over rows.
            target = pixels(batch[key]) if key == "image" else batch[key]
            losses[key] = 0.5 * F.mse_loss(recon, target, reduction="sum") / rows
        reward = batch["reward"]
        if args.reward_transform == "tanh":
            reward = torch.tanh(reward)
        losses["reward"] = self.reward.loss(feat, reward).mean()
        if self.discount:
            # The soft target holds gamma: the predicted discount is not multiplied by it again.
            target = args.gamma * (1 - batch["is_terminal"])
            losses["discount"] = F.binary_cross_entropy_with_logits(self.discount(feat), target)
        losses["kl"], kl = self.kl_loss(post, prior)
        scale = {
            "vector": args.vector_scale, "discount": args.discount_scale, "kl": args.kl_scale,
        }  # fmt: skip
        loss = sum(scale.get(k, 1.0) * v for k, v in losses.items())
        metrics = {f"losses/{k}": v for k, v in losses.items()} | {"losses/model": loss}
        metrics["model/kl"] = kl.mean()
        metrics["model/post_entropy"] = self.rssm.dist(detach(post)).entropy().sum(-1).mean()
        metrics["model/prior_entropy"] = self.rssm.dist(detach(prior)).entropy().sum(-1).mean()
        return loss, post, detach(metrics)

    def kl_loss(self, post, prior):
        """Alg. 2: most of the KL trains the prior -> loss (), KL(post || prior) of (T, B)."""
        free = self.args.free_nats
        alpha = self.args.kl_balance
        if alpha == 0.5:  # in the released code the plain KL, with free nats for each step
            kl = self.rssm.kl(post, prior)
            return kl.clamp(min=free).mean(), kl
        kl = self.rssm.kl(detach(post), prior)  # (T, B)
        train_prior = kl
        train_post = self.rssm.kl(post, detach(prior))  # the same number, with another gradient
        if self.args.free_avg:
            train_prior = runtime.process_mean(train_prior.mean())
            train_post = runtime.process_mean(train_post.mean())
        loss = alpha * train_prior.clamp(min=free) + (1 - alpha) * train_post.clamp(min=free)
        return loss.mean(), kl

    @torch.no_grad()
    def open_loop(self, batch, context=5):
        """Sees `context` steps, then dreams -> truth, model and error: (T, B, C, 3H, W)."""
        first = {k: v[:context] for k, v in batch.items()}
        post, _ = self.rssm.observe(self.encoder(first), first["action"], first["is_first"])
        states = [{k: v[t] for k, v in post.items()} for t in range(len(first["action"]))]
        for action in batch["action"][context:]:
            states.append(self.rssm.img_step(states[-1], action))
        model = self.decoder(self.rssm.feat(stack(states)))["image"] + 0.5
        truth = pixels(batch["image"]) + 0.5
        return torch.cat([truth, model, (model - truth + 1) / 2], -2)


def lambda_return(reward, next_value, disc, lambda_):
    """Eq. 4, from the last step back: (I-1, N) each -> (I-1, N).

    next_value: of the state after each reward; the last one stands for all that follows.
    """
    target = reward + disc * (1 - lambda_) * next_value
    ret = next_value[-1]
    returns = []
    for t in reversed(range(len(reward))):
        ret = target[t] + disc[t] * lambda_ * ret
        returns.append(ret)
    return torch.stack(returns[::-1])


def behavior_loss(world_model, actor, critic, slow_critic, post, is_terminal, args):
    """Actor and critic losses on imagined rollouts (Eqs. 4-6); is_terminal is (T, B)."""
    start = {k: v.flatten(0, 1) for k, v in detach(post).items()}  # (N, ...)
    # REINFORCE needs no gradient through the dream.
    with torch.set_grad_enabled(args.actor_grad != "reinforce"):
        feat, action = world_model.rssm.imagine(actor, start, args.imag_horizon)  # (I, N, ...)
        reward = world_model.reward(feat)  # (I, N)
        slow_value = slow_critic(feat)  # (I, N)
        disc = torch.full_like(reward, args.gamma)
        if world_model.discount:
            # Replay knows whether the start state was terminal, so that is not predicted.
            predicted = torch.sigmoid(world_model.discount(feat[1:]))  # gamma included
            disc = torch.cat([args.gamma * (1 - is_terminal.reshape(1, -1)), predicted])
        ret = lambda_return(reward[:-1], slow_value[1:], disc[:-1], args.discount_lambda)
        weight = torch.cumprod(torch.cat([torch.ones_like(disc[:1]), disc[:-1]]), 0).detach()

    # state   z0   z1   z2   z3    With I = 4. The policy at z_i chose action[i + 1], so ret[i + 1]
    # action       a1   a2   a3    judges it. z2 chose a3, whose return is unknown: the last two
    # ret     g0   g1   g2         states train no policy, and the last one trains no critic.
    policy = actor(feat[:-2].detach())
    entropy = policy.entropy()  # (I-2, N)
    mix = {"reinforce": 0.0, "dynamics": 1.0, "both": args.actor_grad_mix}[args.actor_grad]
    objective = args.actor_entropy * entropy
    if mix < 1:
        advantage = (ret[1:] - slow_value[:-2]).detach()
        objective = objective + (1 - mix) * policy.log_prob(action[1:-1].detach()) * advantage
    if mix > 0:
        objective = objective + mix * ret[1:]
    value = critic(feat[:-1].detach())  # (I-1, N)
    actor_loss = -(weight[:-2] * objective).mean()  # Eq. 6
    critic_loss = (weight[:-1] * 0.5 * (value - ret.detach()).square()).mean()  # Eq. 5
    metrics = {"actor_entropy": entropy, "reward": reward, "discount": disc, "return": ret}
    metrics |= {"value": value, "slow_value": slow_value}
    metrics = {f"imag/{k}": v.mean() for k, v in metrics.items()}
    metrics |= {"losses/actor": actor_loss, "losses/critic": critic_loss}
    return actor_loss, critic_loss, detach(metrics)


def make_agent(shapes, args):
    """Fresh networks; shapes: action (A,), image (C, 64, 64) and/or vector (V,)."""
    model = WorldModel(shapes, args)
    size = model.rssm.feat_size
    agent = nn.ModuleDict({"world_model": model})
    agent["actor"] = Actor(size, shapes["action"][0], args)
    agent["critic"] = Head(size, args.layers, args)
    agent["slow_critic"] = Head(size, args.layers, args)
    for module in agent.modules():  # Keras's defaults, on which the released code relies
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    if args.reward_head == "twohot":
        nn.init.zeros_(model.reward.out.weight)  # the outer bins are huge: begin at 0
    agent["slow_critic"].requires_grad_(False)
    agent.to(memory_format=torch.channels_last)  # for faster convolutions on a CPU
    if args.compile:
        model.rssm.obs_step = torch.compile(model.rssm.obs_step)
        model.rssm.img_step = torch.compile(model.rssm.img_step)
    return agent


def make_optimizers(agent, args):
    """An Adam for each of the three losses; capturable, so that a GPU can record its steps."""
    rates = {"world_model": args.model_lr, "actor": args.actor_lr, "critic": args.critic_lr}
    optimizers = {}
    for name, lr in rates.items():
        decay = args.weight_decay / lr  # the share per update: AdamW multiplies it by lr
        optimizers[name] = torch.optim.AdamW(
            agent[name].parameters(), lr, eps=args.adam_eps, weight_decay=decay,
            fused=True, capturable=True,
        )  # fmt: skip
    return optimizers


def opt_step(optimizer, loss, clip):
    """One gradient step -> the gradient's global norm before it was clipped, ()."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = [p for p in parameters if p.requires_grad]
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)  # passes through other networks without training them
    runtime.average_gradients(parameters)  # over the processes of torchrun
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm


def update(agent, optimizers, batch, args):
    """Learns from a batch, a dict of (T, B, ...) -> metrics: dict of ()."""
    bfloat16 = args.precision == "bfloat16"
    autocast = torch.autocast(batch["reward"].device.type, torch.bfloat16, enabled=bfloat16)
    with autocast:
        model_loss, post, metrics = agent["world_model"].loss(batch)
    metrics["grad_norm/model"] = opt_step(optimizers["world_model"], model_loss, args.clip)
    with autocast:  # imagines with the model after its step, from states before it
        actor_loss, critic_loss, imagined = behavior_loss(
            agent["world_model"], agent["actor"], agent["critic"], agent["slow_critic"],
            post, batch["is_terminal"], args,
        )  # fmt: skip
    metrics["grad_norm/actor"] = opt_step(optimizers["actor"], actor_loss, args.clip)
    metrics["grad_norm/critic"] = opt_step(optimizers["critic"], critic_loss, args.clip)
    return metrics | imagined


@torch.no_grad()
def policy(agent, row, state, sample=True):
    """A step of acting: row, a dict of (N, ...), and the state before -> action (N, A), state.

    Without `sample` the action is the mode; the latent state is a sample in either case.
    """
    rssm = agent["world_model"].rssm
    embed = agent["world_model"].encoder(row)
    state = rssm.obs_step(state, row["action"], embed, row["is_first"])
    dist = agent["actor"](rssm.feat(state))
    action = dist.rsample() if sample else dist.mode
    return action, {k: state[k] for k in ("deter", "stoch")}  # as in RSSM.initial


def resolve_auto(args, device, discrete):
    """Puts in place of "auto" what it stands for on this device and with these actions."""
    if args.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bfloat16" if fast else "float32"
    if args.actor_dist == "auto":
        args.actor_dist = "onehot" if discrete else "trunc_normal"
    if args.actor_grad == "auto":
        args.actor_grad = "reinforce" if discrete else "dynamics"
    if discrete != (args.actor_dist == "onehot"):
        raise UserError(f"--actor-dist {args.actor_dist} is not for {args.env_id}'s actions")


def updates_owed(step, args):
    """Updates in all: `pretrain` and one when random play ends, then one per `train_every`."""
    if step < args.prefill:
        return 0
    return args.pretrain + 1 + (step - args.prefill) // args.train_every


def replay_capacity(args):
    """Rows that the replay keeps of each environment; UserError if a batch would not fit."""
    envs = args.num_envs * runtime.WORLD
    steps = args.total_frames // args.action_repeat
    # Resets take rows too; where they are more than one in 20 steps, the oldest rows go.
    rows = min(args.replay_size, int(1.05 * steps) + 1000) // envs
    if args.batch_length > rows:
        rest = f"--replay-size and --total-frames leave an environment {rows} rows"
        raise UserError(f"--batch-length {args.batch_length} is too long, {rest}")
    return rows


def main(args):
    """Trains an agent, or with --evaluate plays a trained one -> exit code."""
    device = runtime.setup(args.seed, args.cuda, args.torch_deterministic, args.threads)
    envs, eval_envs = common.make_envs(args)
    shapes = eval_envs.shapes
    precision = args.precision
    resolve_auto(args, device, eval_envs.discrete)
    config = asdict(args) | {"precision": precision}  # as given: a run may move to a GPU
    agent = make_agent(shapes, args).to(device)
    optimizers = make_optimizers(agent, args)
    rssm = agent["world_model"].rssm
    # A GPU records each of these and replays it, writing over the outputs of the call before.
    act = runtime.Captured(partial(policy, agent), device, args.graph)
    act_greedily = runtime.Captured(partial(policy, agent, sample=False), device, args.graph)
    learn = runtime.Captured(partial(update, agent, optimizers, args=args), device, args.graph)
    evaluate = partial(
        common.evaluate, eval_envs, act_greedily, rssm.initial(eval_envs.num_envs),
        args.eval_episodes, film=args.capture_video,
    )  # fmt: skip
    if args.evaluate:
        runtime.check_shapes(args.evaluate, shapes, args.env_id)
        runtime.load_checkpoint(args.evaluate, {"agent": agent})
        returns, cut, film = evaluate()
        runtime.print_evaluation(args.evaluate, returns, cut, film)
        runtime.print_variation(args, returns)
        return 0

    # Begin a run, or go on with that of --resume.
    total_steps = args.total_frames // args.action_repeat
    total_updates = updates_owed(total_steps, args)
    batch_size = math.ceil(args.batch_size / runtime.WORLD)  # the share of this process
    capacity = replay_capacity(args)
    replay_bytes = capacity * args.num_envs * common.row_bytes(shapes)
    checkpoint_bytes = runtime.checkpoint_bytes(agent)
    run, is_new = runtime.open_run(config, shapes, replay_bytes, checkpoint_bytes)
    runtime.seed_process(args.seed)  # weights are the same in every process, later noise is not
    replay_folder = runtime.rank_folder(run) / "replay"
    replay = common.Replay(replay_folder, capacity, shapes, args.num_envs, device)
    runtime.describe(args, device, agent, replay, envs.summary, total_updates)
    metrics = runtime.Metrics()
    logger = runtime.Logger(run, config, total_updates)
    parts = {  # all that a checkpoint holds, but for the counters
        "agent": agent, "optimizers": optimizers, "replay": replay, "envs": envs,
        "metrics": metrics, "logger": logger,
    }  # fmt: skip
    counters = {"step": 0, "updates": 0, "last_report": 0}
    if not is_new:
        counters = runtime.load_checkpoint(run, parts)
        runtime.write_args(run, config)  # some flags may have changed
    step = counters["step"]  # agent steps of all environments
    updates = counters["updates"]
    last_report = counters["last_report"]  # frames
    frames = step * args.action_repeat
    row = None  # until the first step, which resets
    state = rssm.initial(args.num_envs)

    def save():
        now = {"step": step, "updates": updates, "last_report": last_report}
        runtime.save_checkpoint(run, parts, now)

    def due(every):
        """Whether a multiple of `every` frames, or the end, came since the last report."""
        if frames == last_report:
            return False
        return step >= total_steps or (every > 0 and frames // every > last_report // every)

    if is_new:
        save()  # so that a run can be resumed from its first moment on
    if device.type == "cpu" and not args.compile:
        batch = replay.zeros(batch_size, args.batch_length)
        learn_once = partial(update, batch=batch, args=args)
        runtime.print_estimate(learn_once, agent, optimizers, total_updates - updates)
    with runtime.Interrupt() as interrupt:  # on a signal or a failed environment: save and end
        # A turn sends a step, learns and reports meanwhile, and receives the step. Until then
        # step, frames and replay know nothing of it: it can be dropped at any time.
        while True:
            finished = step >= total_steps  # then this turn learns what is owed and reports
            learning = step >= args.prefill and len(replay) >= args.batch_length

            # Act: environments begin a step, a reset where an episode has ended. The noise
            # follows from seed and step, so that a step that is dropped changes no later draw.
            if not finished:
                with runtime.forked_rng("acting", args.seed, step):
                    if learning and not envs.all_ended:
                        action, state = act(row, state)
                    else:
                        action = envs.random_actions()
                envs.send(action)

            # Learn while they step. A resumed run makes up for updates that a signal prevented.
            owed = updates_owed(step, args)
            while learning and updates < owed and not interrupt.agreed():
                batch = replay.sample(batch_size, args.batch_length, args.favor_ends)
                losses = learn(batch)
                if updates % args.slow_update == 0:
                    agent["slow_critic"].load_state_dict(agent["critic"].state_dict())
                metrics.record(losses, updates)
                updates += 1
                logger.progress(frames, updates)
            if interrupt.agreed():
                break  # the step in flight is dropped: nothing of it was stored

            # Report what became due since the last report; save before an evaluation can fail.
            if due(args.checkpoint_every):
                save()
            if due(args.eval_every) and (updates or finished):
                returns, cut, film = evaluate(interrupt=interrupt)
                if interrupt.agreed():
                    break  # a resumed run evaluates again
                result = {"eval/episodic_return": returns.mean(), "eval/cut_episodes": cut}
                logger.log(result, frames, updates)
                if film:
                    logger.gif("eval/episode", film, frames)
                if finished:
                    logger.bar.close()
                    runtime.print_evaluation(run, returns, cut)
            if due(args.log_every) and updates:
                logger.log(metrics.read() | {"replay/rows": len(replay)}, frames, updates)
            if args.video_every and due(args.video_every) and learning and "image" in shapes:
                with runtime.forked_rng("video", args.seed):
                    film = agent["world_model"].open_loop(replay.sample(6, args.batch_length))
                logger.gif("open_loop", film, frames)
            last_report = frames
            if finished:
                break

            # Observe.
            row, episodes = envs.receive()
            taken, episodes = runtime.gather_steps(row, episodes)  # of all processes
            replay.add(row)
            step += taken  # a reset is no step
            frames = step * args.action_repeat
            logger.progress(frames, updates)
            for episode in episodes:
                logger.log(episode, frames, updates)

    save()
    for part in (logger, eval_envs, envs):
        part.close()
    if interrupt.code:
        print(f"go on with: {runtime.resume_command(run, args.env_id)}")
    return interrupt.code


if __name__ == "__main__":
    with runtime.exit_on_error():
        sys.exit(main(runtime.parse_args(Args, PRESETS, common.choose_preset)))
