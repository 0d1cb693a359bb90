"""DreamerV3: Hafner et al., "Mastering Diverse Domains through World Models", arXiv 2301.04104v2.

This is DreamerV2 with one set of hyperparameters for every task: block GRU, RMSNorm, latents with
a share of the uniform, symlog and two-hot predictions, returns normalised by their range, and one
optimizer. Where paper and code disagree we follow the code of the paper's time. Windows begin with
the zero state and Atari's images are 64x64; docs/differences.md lists the rest.

    python dreamerv3.py --env-id CartPole-v1                # learns in minutes on a laptop
    python dreamerv3.py --env-id PongNoFrameskip-v4         # at full size

A row of experience holds an observation, the action that led to it, and what came with it:

    row           0 (reset)  1          2 (done)   3 (reset)  4
    action        0          a1         a2         0          a4
    image         o0         o1         o2         o3         o4
    reward        0          r1         r2         0          r4
    is_first      1          0          0          1          0
    is_terminal   0          0          1, or 0    0          0         0 if only time ran out

Shapes: T steps, B sequences, N = T * B imagination starts (when acting, N environments),
I = horizon + 1 imagined states, A action, E embed, D deter, S x K stoch, F feat, U units, G blocks;
C, H, W image, V vector. A scalar per step is (T, B).
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
    # defaults for a family of environments; auto: by id, never atari100k or crafter
    preset: Literal[
        "auto", "atari", "atari100k", "dmc_pixels", "dmc_vector", "crafter", "other"
    ] = "auto"
    exp_name: str = Path(__file__).stem  # part of a run folder's name
    seed: Whole = 1  # seed of networks, replay and environments
    total_frames: Count = 204_000_000  # env frames, action repeat included
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
    num_envs: Count = 16  # environments that act at once
    async_envs: bool = False  # each environment in a process of its own
    # what to learn from; auto: images of dm_control, elsewhere all that the environment gives
    observation: Literal["auto", "pixels", "vector", "both"] = "auto"
    pixels: bool = False  # learn from images, rendered if need be
    grayscale: bool = True  # images of one channel, not three
    action_repeat: Count = 4  # frames per agent step
    time_limit: Whole = 108_000  # frames per episode, 0 is the environment's own limit
    # Atari: chance of the last action again; None is that of the id
    sticky_prob: Annotated[float | None, 0, 1] = 0.25
    full_action_space: bool = True  # Atari: all 18 actions, not only the game's
    # --- replay ---
    replay_size: Count = 5_000_000  # rows that are kept, resets included
    batch_size: Count = 16  # B, sequences in a batch
    batch_length: Annotated[int, 2, 2**31 - 1] = 64  # T, agent steps of a sequence
    # --- world model ---
    blocks: Count = 8  # G, blocks of weights in recurrent model and image decoder
    # size of the networks, in about so many parameters; all but tiny are the authors'
    size: Literal["tiny", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "200m"
    deter: Whole = 0  # D, size of the recurrent state; 0: that of --size
    hidden: Whole = 0  # units inside the RSSM; 0: those of --size
    stoch: Count = 32  # S, number of latent variables
    classes: Whole = 0  # K, classes of each latent variable; 0: those of --size
    cnn_depth: Whole = 0  # channels of the first convolution; 0: those of --size
    units: Whole = 0  # units of dense layers outside the RSSM; 0: those of --size
    layers: Count = 3  # dense layers of encoder, decoder, actor and critic
    unimix: Share = 0.01  # share of the uniform in latents and discrete actions
    dyn_scale: Weight = 1.0  # weight of the KL that trains the prior
    rep_scale: Weight = 0.1  # weight of the KL that trains the posterior
    free_nats: Weight = 1.0  # nats of each KL of each step that cost nothing
    # --- behavior ---
    gamma: Share = 1 - 1 / 333  # discount per agent step
    discount_lambda: Share = 0.95  # lambda of the returns
    imag_horizon: Annotated[int, 2, 2**31 - 1] = 15  # imagined steps
    # the policy's distribution; auto: by the kind of actions
    actor_dist: Literal["auto", "onehot", "normal"] = "auto"
    actor_entropy: Weight = 3e-4  # eta of Eq. 6, the weight of the entropy
    return_rate: Share = 0.01  # share of the newest returns in their running range
    replay_critic: Weight = 0.3  # weight of the critic's loss on replayed states
    slow_rate: Share = 0.02  # share of its distance to the critic that slow_critic moves per update
    slow_scale: Weight = 1.0  # weight of the critic's loss for the slow critic's values
    eval_sample: bool = True  # evaluate with sampled actions, not with the mode
    # --- optimizer ---
    train_ratio: Rate = 32.0  # replayed steps to learn from per agent step
    lr: Rate = 4e-5  # learning rate
    warmup: Count = 1000  # updates in which the learning rate rises from 0
    agc: Rate = 0.3  # most that a gradient's norm may be, as a share of its weight's
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
ATARI100K = {
    "total_frames": 440_000, "num_envs": 1, "sticky_prob": 0.0, "grayscale": False,
    "time_limit": 100_000, "train_ratio": 256.0, "eval_every": 40_000, "checkpoint_every": 40_000,
    "video_every": 40_000,
}  # fmt: skip
DMC = {
    "size": "12m", "train_ratio": 512.0, "action_repeat": 2, "time_limit": 1000, "grayscale": False,
    "log_every": 1000, "eval_every": 10_000, "video_every": 50_000, "checkpoint_every": 50_000,
}  # fmt: skip
CRAFTER = {
    "total_frames": 1_100_000, "num_envs": 1, "train_ratio": 512.0, "action_repeat": 1,
    "time_limit": 0, "grayscale": False, "eval_every": 50_000, "checkpoint_every": 50_000,
}  # fmt: skip
SMALL = {
    "total_frames": 30_000, "num_envs": 1, "action_repeat": 1, "time_limit": 0, "threads": 1,
    "grayscale": False, "batch_size": 8, "batch_length": 32, "size": "tiny", "blocks": 4,
    "layers": 2, "gamma": 0.99, "train_ratio": 64.0, "lr": 3e-4, "warmup": 100,
    "log_every": 1000, "eval_every": 1000, "eval_episodes": 20, "video_every": 5000,
    "checkpoint_every": 10_000,
}  # fmt: skip
PRESETS = {
    "atari": {}, "atari100k": ATARI100K, "dmc_pixels": DMC | {"total_frames": 1_200_000},
    "dmc_vector": DMC | {"total_frames": 600_000}, "crafter": CRAFTER, "other": SMALL,
}  # fmt: skip
SIZES = {  # deter, units (hidden too), classes, cnn_depth
    "tiny": (256, 64, 8, 8), "1m": (512, 64, 4, 4), "12m": (2048, 256, 16, 16),
    "25m": (3072, 384, 24, 24), "50m": (4096, 512, 32, 32), "100m": (6144, 768, 48, 48),
    "200m": (8192, 1024, 64, 64), "400m": (12288, 1536, 96, 96),
}  # fmt: skip


def symlog(x):
    """Eq. 9, which keeps the sign and shrinks what is large."""
    return x.sign() * x.abs().log1p()


def symexp(x):
    """The inverse of symlog."""
    return x.sign() * x.abs().expm1()


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm, in float32.

    x: (..., U), or images (batch, C, H, W) with a norm over the channels of each pixel.
    """

    def __init__(self, size, channels_first):
        super().__init__(size, eps=1e-4)
        self.channels_first = channels_first

    def forward(self, x):
        if self.channels_first:
            return super().forward(x.float().movedim(1, -1)).movedim(-1, 1)
        return super().forward(x.float())


def block(layer):
    """A linear or convolutional layer, its norm and its activation."""
    dense = isinstance(layer, nn.Linear | BlockLinear)
    norm = RMSNorm(len(layer.bias), channels_first=not dense)
    return nn.Sequential(layer, norm, nn.SiLU())


def mlp(inputs, layers, args):
    """Dense layers: (..., inputs) -> (..., U)."""
    sizes = [inputs] + [args.units] * layers
    return nn.Sequential(*(block(nn.Linear(i, o)) for i, o in pairwise(sizes)))


class BlockLinear(nn.Module):
    """G linear layers side by side, each from a slice of the inputs to a slice of the outputs."""

    def __init__(self, inputs, outputs, blocks):
        super().__init__()
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, outputs // blocks, inputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        """(..., inputs) -> (..., outputs)"""
        slices = x.flatten(0, -2).unflatten(-1, (self.blocks, -1)).movedim(1, 0)  # (G, batch, .)
        out = torch.bmm(slices, self.weight.mT).movedim(0, 1).flatten(1)  # (batch, outputs)
        return (out + self.bias).unflatten(0, x.shape[:-1])


def pixels(image):
    """uint8 -> float in [-0.5, 0.5], in training and in acting."""
    return image.float() / 255 - 0.5


class SameConv(nn.Conv2d):
    """A convolution that halves the size, with TensorFlow's padding: one before, two after."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 5, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (1, 2, 1, 2)))


class Encoder(nn.Module):
    """Image and vector to one embedding: (..., C, 64, 64), (..., V) -> (..., E)."""

    def __init__(self, shapes, args):
        super().__init__()
        self.image = shapes.get("image")
        self.vector = shapes.get("vector")
        self.size = 0  # E
        d = args.cnn_depth
        if self.image:
            channels = [d, 2 * d, 3 * d, 4 * d, 4 * d]  # at 64, 32, 16, 8 and 4 pixels
            self.conv = nn.Sequential(
                block(nn.Conv2d(self.image[0], d, 5, padding=2)),
                *(block(SameConv(i, o)) for i, o in pairwise(channels)),
            )
            self.size += 4 * d * 4 * 4
        if self.vector:
            self.mlp = mlp(self.vector[0], args.layers, args)
            self.size += args.units

    def forward(self, obs):
        embed = []
        if self.vector:
            embed.append(self.mlp(symlog(obs["vector"])))
        if self.image:
            x = self.conv(pixels(obs["image"]).flatten(0, -4))  # (batch, 4d, 4, 4)
            embed.append(x.flatten(1).unflatten(0, obs["image"].shape[:-3]))
        return torch.cat(embed, -1)


class SameDeconv(nn.ConvTranspose2d):
    """A transposed convolution that doubles the size, aligned as TensorFlow's."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 5, stride=2, padding=1)

    def forward(self, x):
        return super().forward(x)[..., :-1, :-1]


class Decoder(nn.Module):
    """(..., F) -> dict of image (..., C, 64, 64), vector (..., V) in symlog space."""

    def __init__(self, feat_size, shapes, args):
        super().__init__()
        self.image = shapes.get("image")
        self.vector = shapes.get("vector")
        self.deter = args.deter
        d = args.cnn_depth
        if self.image:
            size = 4 * d * 4 * 4
            self.deter_in = BlockLinear(args.deter, size, args.blocks)
            self.stoch_in = nn.Sequential(
                block(nn.Linear(feat_size - args.deter, 2 * args.units)),
                nn.Linear(2 * args.units, size),
            )
            self.norm = nn.Sequential(RMSNorm(4 * d, channels_first=True), nn.SiLU())
            channels = [4 * d, 4 * d, 3 * d, 2 * d, d]  # at 4, 8, 16, 32 and 64 pixels
            self.conv = nn.Sequential(
                *(block(SameDeconv(i, o)) for i, o in pairwise(channels)),
                nn.Conv2d(d, self.image[0], 5, padding=2),
            )
        if self.vector:
            layers = mlp(feat_size, args.layers, args)
            self.mlp = nn.Sequential(layers, nn.Linear(args.units, self.vector[0]))

    def forward(self, feat):
        recon = {}
        if self.image:
            deter, stoch = feat.flatten(0, -2).tensor_split([self.deter], -1)
            x = self.deter_in(deter) + self.stoch_in(stoch)
            x = x.unflatten(-1, (-1, 4, 4))  # (batch, 4d, 4, 4)
            x = self.conv(self.norm(x)).float().sigmoid() - 0.5
            recon["image"] = x.unflatten(0, feat.shape[:-1])
        if self.vector:
            recon["vector"] = self.mlp(feat).float()
        return recon


class Head(nn.Module):
    """A scalar from the features, for the discount its logit: (..., F) -> (...)."""

    def __init__(self, feat_size, layers, args):
        super().__init__()
        self.mlp = mlp(feat_size, layers, args)
        self.out = nn.Linear(args.units, 1)

    def logits(self, feat):
        x = self.mlp(feat).float()
        # In float32: bfloat16 rounds the logits, and the outer bins of a two-hot are huge.
        with torch.autocast(feat.device.type, enabled=False):
            return self.out(x)

    def forward(self, feat):
        return self.logits(feat).squeeze(-1)


class TwoHotHead(Head):
    """The mean of 255 bins, which are evenly spaced in symlog space (Eq. 10)."""

    def __init__(self, feat_size, layers, args):
        super().__init__(feat_size, layers, args)
        self.out = nn.Linear(args.units, 255)
        below = symexp(torch.linspace(-20, 0, 128))
        self.register_buffer("bins", torch.cat([below, -below[:-1].flip(0)]))

    def forward(self, feat):
        return self.mean(self.logits(feat))

    def mean(self, logits):
        prob = torch.softmax(logits, -1)
        # Bins k and 254 - k are opposite and cancel, so that equal logits give exactly 0.
        return ((prob - prob.flip(-1))[..., 128:] * self.bins[128:]).sum(-1)

    def loss(self, logits, target):
        """Cross-entropy with the target shared between its two neighbors: (...) (Eqs. 11, 12)."""
        above = torch.searchsorted(self.bins, target).clamp(1, 254)
        low = self.bins[above - 1]
        high = self.bins[above]
        share = ((target - low) / (high - low)).clamp(0, 1)
        logp = torch.log_softmax(logits, -1)
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


def unimix(logit, share):
    """Logits of a mixture with the uniform distribution, in float32: (..., K)."""
    if share == 0:
        return logit.float()  # the logarithm below would be infinite where a probability is 0
    probs = runtime.softmax(logit.float())
    return ((1 - share) * probs + share / probs.shape[-1]).log()


class Actor(nn.Module):
    """Policy over one-hot or continuous actions: (..., F) -> distribution over (..., A)."""

    def __init__(self, feat_size, action_dim, args):
        super().__init__()
        self.dist = args.actor_dist
        self.unimix = args.unimix
        self.mlp = mlp(feat_size, args.layers, args)
        self.out = nn.Linear(args.units, action_dim)
        if self.dist != "onehot":
            self.std = nn.Linear(args.units, action_dim)

    def forward(self, feat):
        x = self.mlp(feat).float()
        with torch.autocast(feat.device.type, enabled=False):  # as in Head
            if self.dist == "onehot":
                return OneHot(unimix(self.out(x), self.unimix))
            std = 0.9 * torch.sigmoid(self.std(x) + 2) + 0.1
            return td.Independent(td.Normal(torch.tanh(self.out(x)), std), 1)


def stack(states):
    """T dicts of (B, ...) -> a dict of (T, B, ...)."""
    return {k: torch.stack([state[k] for state in states]) for k in states[0]}


def detach(tensors):
    return {k: v.detach() for k, v in tensors.items()}


class RSSM(nn.Module):
    """Recurrent state-space model (Eq. 1): a deterministic path in blocks and S categoricals.

    State: deter (..., D), stoch (..., S * K), logit (..., S, K), mixed with the uniform.
    """

    def __init__(self, embed_size, action_dim, args):
        super().__init__()
        self.deter = args.deter
        self.blocks = args.blocks
        self.stoch = args.stoch
        self.classes = args.classes
        self.unimix = args.unimix
        self.stoch_size = args.stoch * args.classes
        self.feat_size = self.stoch_size + args.deter
        stats_size = self.stoch_size
        self.deter_in = block(nn.Linear(args.deter, args.hidden))
        self.stoch_in = block(nn.Linear(self.stoch_size, args.hidden))
        self.action_in = block(nn.Linear(action_dim, args.hidden))
        # Each block has its own slice of deter, and the outputs of all three layers above.
        inputs = args.deter + args.blocks * 3 * args.hidden
        self.gru_in = block(BlockLinear(inputs, args.deter, args.blocks))
        self.gru = BlockLinear(args.deter, 3 * args.deter, args.blocks)
        self.img_out = nn.Sequential(
            block(nn.Linear(args.deter, args.hidden)), block(nn.Linear(args.hidden, args.hidden)),
            nn.Linear(args.hidden, stats_size),
        )  # fmt: skip
        self.obs_out = nn.Sequential(
            block(nn.Linear(args.deter + embed_size, args.hidden)),
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
        return torch.cat([state["deter"], state["stoch"]], -1)  # (..., F); Decoder splits it

    def stats(self, x):
        """A linear layer's output as the statistics of stoch."""
        return {"logit": unimix(x.unflatten(-1, (self.stoch, self.classes)), self.unimix)}

    def dist(self, stats):
        return OneHot(stats["logit"])

    def state(self, deter, x):
        """Samples stoch from the linear layer's output x."""
        stats = self.stats(x)
        stoch = self.dist(stats).rsample()
        return {"deter": deter, "stoch": stoch.flatten(-2), **stats}

    def gru_step(self, prev, action):
        """h_t = f(h_{t-1}, z_{t-1}, a_t); the papers write a_{t-1} for this action."""
        # Actions are stored as sampled; the model sees none beyond [-1, 1].
        action = action.clamp(-1, 1)
        inputs = [
            self.deter_in(prev["deter"]),
            self.stoch_in(prev["stoch"]),
            self.action_in(action),
        ]
        shared = torch.cat(inputs, -1)[:, None].expand(-1, self.blocks, -1)  # (B, G, 3 * hidden)
        own = prev["deter"].unflatten(-1, (self.blocks, -1))  # (B, G, D / G)
        x = self.gru_in(torch.cat([own, shared], -1).flatten(1))  # (B, D)
        parts = self.gru(x).float().unflatten(-1, (self.blocks, -1))  # (B, G, 3 * D / G)
        reset, cand, update = parts.chunk(3, -1)  # (B, G, D / G) each
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)  # begins by keeping most of the old state
        return torch.lerp(own, cand, update).flatten(1)  # (1 - update) * old + update * cand

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

    def observe(self, embed, action, is_first, start=None):
        """(T, B, E), (T, B, A), (T, B) -> post, prior: dicts of (T, B, ...).

        start: the state before the window; without one the first row counts as a reset.
        """
        if start is None:  # what came before the window is not known
            start = self.initial(embed.shape[1])
            is_first = torch.cat([torch.ones_like(is_first[:1]), is_first[1:]])
        state = start
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
            actions.append(actor(feats[-1]).rsample())  # (N, A)
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
        self.reward = TwoHotHead(size, layers=1, args=args)
        self.discount = Head(size, layers=1, args=args)

    def loss(self, batch, start=None):
        """Eqs. 2, 3: batch, a dict of (T, B, ...) -> loss (), post (T, B, ...), metrics.

        start: the state before the batch, see `RSSM.observe`.
        """
        args = self.args
        embed = self.encoder(batch)
        post, prior = self.rssm.observe(embed, batch["action"], batch["is_first"], start)
        feat = self.rssm.feat(post)  # (T, B, F)
        losses = {}
        recon = self.decoder(feat)
        if "image" in recon:
            error = recon["image"] - pixels(batch["image"])
            losses["image"] = error.square().flatten(2).sum(-1)  # (T, B)
        if "vector" in recon:
            square = (recon["vector"] - symlog(batch["vector"])).square()  # (T, B, V)
            # The authors' symlog loss ignores errors below 1e-4.
            losses["vector"] = torch.where(square < 1e-8, 0.0, square).sum(-1)  # (T, B)
        losses["reward"] = self.reward.loss(self.reward.logits(feat), batch["reward"])
        # The soft target holds gamma: the predicted discount is not multiplied by it again.
        target = args.gamma * (1 - batch["is_terminal"])
        losses["discount"] = F.binary_cross_entropy_with_logits(
            self.discount(feat), target, reduction="none"
        )
        # Below the free nats the KL of a step has no gradient.
        kl = self.rssm.kl(detach(post), prior)  # (T, B)
        losses["dyn"] = kl.clamp(min=args.free_nats)
        losses["rep"] = self.rssm.kl(post, detach(prior)).clamp(min=args.free_nats)
        losses = {k: v.mean() for k, v in losses.items()}
        scale = {"dyn": args.dyn_scale, "rep": args.rep_scale}
        loss = sum(scale.get(k, 1.0) * v for k, v in losses.items())
        metrics = {f"losses/{k}": v for k, v in losses.items()} | {"losses/model": loss}
        metrics["model/kl"] = kl.mean()
        metrics["model/post_entropy"] = self.rssm.dist(detach(post)).entropy().sum(-1).mean()
        metrics["model/prior_entropy"] = self.rssm.dist(detach(prior)).entropy().sum(-1).mean()
        return loss, post, detach(metrics)

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
    """Eq. 5, from the last step back: (I-1, N) each -> (I-1, N).

    next_value, disc: of the state that each reward came with; the last value stands for all
    that follows. lambda_: a number, or of that shape. On replay the shapes are (T-1, B).
    """
    target = reward + disc * (1 - lambda_) * next_value
    keep = disc * lambda_
    ret = next_value[-1]
    returns = []
    for t in reversed(range(len(reward))):
        ret = target[t] + keep[t] * ret
        returns.append(ret)
    return torch.stack(returns[::-1])


class ReturnRange(nn.Module):
    """Running averages of the 5th and the 95th percentile of returns, which begin at 0."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.register_buffer("range", torch.zeros(2))

    def update(self, ret):
        """Takes the returns of an update into account."""
        ret = runtime.process_cat(ret)
        percentiles = torch.stack([torch.quantile(ret, share) for share in (0.05, 0.95)])
        self.range.lerp_(percentiles, self.rate)

    def scale(self):
        """max(1, S) of Eq. 6, S of Eq. 7: what to divide advantages by, ()."""
        return (self.range[1] - self.range[0]).clamp(min=1)


def behavior_loss(world_model, actor, critic, slow_critic, return_range, post, is_terminal, args):
    """Losses of actor and critic on imagined rollouts (Eqs. 4-7); is_terminal is (T, B).

    -> actor loss, critic loss, returns of the starts (N,), metrics
    """
    start = {k: v.flatten(0, 1) for k, v in detach(post).items()}  # (N, ...)
    # REINFORCE needs no gradient through the dream. Nothing else keeps the actor's loss out of
    # model and critic: one optimizer steps them all.
    with torch.no_grad():
        feat, action = world_model.rssm.imagine(actor, start, args.imag_horizon)  # (I, N, ...)
        reward = world_model.reward(feat)  # (I, N)
        value = critic(feat)  # (I, N)
        slow_value = slow_critic(feat)  # (I, N)
        # Replay knows whether the start state was terminal, so that is not predicted. The
        # start's discount only weights the losses, and is without gamma.
        predicted = torch.sigmoid(world_model.discount(feat[1:]))  # gamma included
        disc = torch.cat([1 - is_terminal.reshape(1, -1), predicted])  # (I, N)
        ret = lambda_return(reward[1:], value[1:], disc[1:], args.discount_lambda)  # (I-1, N)
        weight = torch.cumprod(disc, 0)  # (I, N), how far each state still counts
        return_range.update(ret)
        advantage = (ret - value[:-1]) / return_range.scale()  # (I-1, N), in Eq. 6

    # state   z0   z1   z2   z3    With I = 4. The policy at z_i chose action[i + 1], and ret[i] is
    # action       a1   a2   a3    what followed it, from reward[i + 1] on. The last state trains
    # ret     g0   g1   g2         nothing.
    policy = actor(feat[:-1])
    entropy = policy.entropy()  # (I-1, N)
    objective = policy.log_prob(action[1:]) * advantage + args.actor_entropy * entropy
    actor_loss = -(weight[:-1] * objective).mean()  # Eq. 6
    error = critic_error(critic, feat[:-1], ret, slow_value[:-1], args)
    critic_loss = (weight[:-1] * error).mean()  # Eq. 5
    metrics = {"actor_entropy": entropy, "reward": reward, "discount": disc, "return": ret}
    metrics |= {"value": value, "slow_value": slow_value}
    metrics = {f"imag/{k}": v.mean() for k, v in metrics.items()}
    metrics["imag/return_range"] = return_range.range[1] - return_range.range[0]
    metrics |= {"losses/actor": actor_loss, "losses/critic": critic_loss}
    return actor_loss, critic_loss, ret[0], detach(metrics)


def critic_error(critic, feat, ret, slow_value, args):
    """Cross-entropies with the returns and with the slow critic's values: (..., F) -> (...)."""
    logits = critic.logits(feat)
    return critic.loss(logits, ret) + args.slow_scale * critic.loss(logits, slow_value)


def replay_critic_loss(rssm, critic, slow_critic, post, start_ret, batch, args):
    """The critic's loss on replayed rewards, which trains the world model too -> ().

    start_ret: imagined returns (N,) from each posterior state, which take the place of values.
    """
    feat = rssm.feat(post)  # (T, B, F), with its gradient
    with torch.no_grad():
        slow_value = slow_critic(feat)
    value = start_ret.unflatten(0, batch["reward"].shape)  # (T, B)
    first = batch["is_first"][1:].float()
    # An episode's last rows. Whether the window's last row is one makes no difference.
    is_last = torch.cat([first, torch.zeros_like(first[:1])])
    disc = args.gamma * (1 - batch["is_terminal"])
    lambda_ = args.discount_lambda * (1 - is_last)
    ret = lambda_return(batch["reward"][1:], value[1:], disc[1:], lambda_[1:])  # (T-1, B)
    error = critic_error(critic, feat[:-1], ret, slow_value[:-1], args)  # (T-1, B)
    return ((1 - is_last[:-1]) * error).mean()


def make_agent(shapes, args):
    """Fresh networks; shapes: action (A,), image (C, 64, 64) and/or vector (V,)."""
    model = WorldModel(shapes, args)
    size = model.rssm.feat_size
    agent = nn.ModuleDict({"world_model": model})
    agent["actor"] = Actor(size, shapes["action"][0], args)
    agent["critic"] = TwoHotHead(size, args.layers, args)
    agent["slow_critic"] = TwoHotHead(size, args.layers, args)
    agent["return_range"] = ReturnRange(args.return_rate)
    for module in agent.modules():
        if isinstance(module, nn.Linear | BlockLinear | nn.Conv2d | nn.ConvTranspose2d):
            init(module)
    for layer in (model.reward.out, agent["critic"].out):
        nn.init.zeros_(layer.weight)  # the outer bins are huge: begin at 0
    with torch.no_grad():
        agent["actor"].out.weight.mul_(0.01)
        if args.actor_dist == "normal":
            agent["actor"].std.weight.mul_(0.01)
        if "vector" in shapes:
            model.decoder.mlp[1].weight.mul_(0.1)
    agent["slow_critic"].load_state_dict(agent["critic"].state_dict())
    agent["slow_critic"].requires_grad_(False)
    agent.to(memory_format=torch.channels_last)  # for faster convolutions on a CPU
    if args.compile:
        model.rssm.obs_step = torch.compile(model.rssm.obs_step)
        model.rssm.img_step = torch.compile(model.rssm.img_step)
    return agent


def init(layer):
    """Weights of a truncated normal, whose variance after the cut is 1 / inputs."""
    if isinstance(layer, BlockLinear):
        inputs = layer.blocks * layer.weight.shape[-1]  # of all blocks
    elif isinstance(layer, nn.ConvTranspose2d):
        inputs = layer.weight[:, 0].numel()  # its weight is (in, out, 5, 5)
    else:
        inputs = layer.weight[0].numel()
    std = 1.1368 / math.sqrt(inputs)  # 1 / 0.8796, the std of a normal cut at +-2
    nn.init.trunc_normal_(layer.weight, 0, std, -2 * std, 2 * std)
    nn.init.zeros_(layer.bias)


class LaProp(torch.optim.Optimizer):
    """Adam with momentum after the division, and gradients cut relative to their weights (AGC)."""

    def __init__(self, parameters, lr, agc, warmup, beta1=0.9, beta2=0.999, eps=1e-20):
        settings = {"lr": lr, "agc": agc, "warmup": warmup}
        settings |= {"beta1": beta1, "beta2": beta2, "eps": eps}
        settings["capturable"] = True  # torch then loads state["step"] to the GPU
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self):
        """The n-th step; the first one has rate 0 and only fills the averages."""
        for group in self.param_groups:
            beta1 = group["beta1"]
            beta2 = group["beta2"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["square"] = torch.zeros_like(p)
                    state["momentum"] = torch.zeros_like(p)
                n = state["step"].add_(1)
                # Cut the gradient relative to its weight.
                limit = group["agc"] * p.norm().clamp(min=1e-3)
                grad = p.grad / (p.grad.norm() / limit).clamp(min=1)
                # Divide it by the root of its mean square.
                state["square"].lerp_(grad.square(), 1 - beta2)
                square = state["square"] / (1 - beta2**n)
                grad = grad / (square.sqrt() + group["eps"])
                # Average what came of it.
                state["momentum"].lerp_(grad, 1 - beta1)
                momentum = state["momentum"] / (1 - beta1**n)
                rate = group["lr"] * ((n - 1) / group["warmup"]).clamp(max=1)
                p -= rate * momentum


def make_optimizer(agent, args):
    """One for all that is trained."""
    parameters = [p for p in agent.parameters() if p.requires_grad]
    return LaProp(parameters, args.lr, args.agc, args.warmup)


def opt_step(optimizer, loss):
    """One gradient step -> the gradient's global norm before it was cut, ()."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    runtime.average_gradients(parameters)  # over the processes of torchrun
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.step()
    return norm


@torch.no_grad()
def follow(slow_critic, critic, rate):
    """Moves the slow critic's weights a share of the way to the critic's."""
    for slow, fast in zip(slow_critic.parameters(), critic.parameters(), strict=True):
        slow.lerp_(fast, rate)


def update(agent, optimizer, batch, args, start=None):
    """Learns from a batch of (T, B, ...), start as in RSSM.observe -> metrics: dict of ()."""
    bfloat16 = args.precision == "bfloat16"
    with torch.autocast(batch["reward"].device.type, torch.bfloat16, enabled=bfloat16):
        model_loss, post, metrics = agent["world_model"].loss(batch, start)
        actor_loss, critic_loss, start_ret, imagined = behavior_loss(
            agent["world_model"], agent["actor"], agent["critic"], agent["slow_critic"],
            agent["return_range"], post, batch["is_terminal"], args,
        )  # fmt: skip
        replay_loss = replay_critic_loss(
            agent["world_model"].rssm, agent["critic"], agent["slow_critic"],
            post, start_ret, batch, args,
        )  # fmt: skip
        loss = model_loss + actor_loss + critic_loss + args.replay_critic * replay_loss
    metrics["grad_norm"] = opt_step(optimizer, loss)
    follow(agent["slow_critic"], agent["critic"], args.slow_rate)
    metrics |= {"losses/replay_critic": replay_loss.detach(), "losses/total": loss.detach()}
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
    """Puts in place of "auto" and of 0 what it stands for: by device, actions and --size."""
    if args.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bfloat16" if fast else "float32"
    if args.actor_dist == "auto":
        args.actor_dist = "onehot" if discrete else "normal"
    if discrete != (args.actor_dist == "onehot"):
        raise UserError(f"--actor-dist {args.actor_dist} is not for {args.env_id}'s actions")
    deter, units, classes, depth = SIZES[args.size]
    args.deter = args.deter or deter
    args.hidden = args.hidden or units
    args.units = args.units or units
    args.classes = args.classes or classes
    args.cnn_depth = args.cnn_depth or depth
    if args.deter % args.blocks:
        raise UserError(f"--deter {args.deter} has to be a multiple of --blocks {args.blocks}")
    if 4 * args.cnn_depth % args.blocks:
        raise UserError(
            f"4 * --cnn-depth {args.cnn_depth} has to be a multiple of --blocks {args.blocks}"
        )


def first_update(args):
    """The agent step from which on the replay has windows for a batch."""
    envs = args.num_envs * runtime.WORLD
    return envs * (args.batch_length - 1 + math.ceil(args.batch_size / envs))


def updates_owed(step, args):
    """Updates in all: one when a batch is there, then as many as --train-ratio says."""
    begin = first_update(args)
    if step < begin:
        return 0
    return 1 + int((step - begin) * args.train_ratio / (args.batch_size * args.batch_length))


def replay_capacity(args):
    """Rows that the replay keeps of each environment; UserError if a batch would not fit."""
    envs = args.num_envs * runtime.WORLD
    steps = args.total_frames // args.action_repeat
    # Resets take rows too; where they are more than one in 20 steps, the oldest rows go.
    rows = min(args.replay_size, int(1.05 * steps) + 1000) // envs
    needed = first_update(args) // envs
    if needed > rows:
        flags = f"--batch-length {args.batch_length} with --batch-size {args.batch_size}"
        rest = f"--replay-size and --total-frames leave an environment {rows}"
        raise UserError(f"{flags} takes {needed} rows, {rest}")
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
    optimizer = make_optimizer(agent, args)
    rssm = agent["world_model"].rssm
    # A GPU records each of these and replays it, writing over the outputs of the call before.
    act = runtime.Captured(partial(policy, agent), device, args.graph)
    play = partial(policy, agent, sample=args.eval_sample)
    act_evaluated = runtime.Captured(play, device, args.graph)
    learn = runtime.Captured(partial(update, agent, optimizer, args=args), device, args.graph)
    evaluate = partial(
        common.evaluate, eval_envs, act_evaluated, rssm.initial(eval_envs.num_envs),
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
        "agent": agent, "optimizer": optimizer, "replay": replay, "envs": envs,
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
        runtime.print_estimate(learn_once, agent, optimizer, total_updates - updates)
    with runtime.Interrupt() as interrupt:  # on a signal or a failed environment: save and end
        # A turn sends a step, learns and reports meanwhile, and receives the step. Until then
        # step, frames and replay know nothing of it: it can be dropped at any time.
        while True:
            finished = step >= total_steps  # then this turn learns what is owed and reports
            learning = len(replay) >= args.batch_length  # there is a window to learn from

            # Act: environments begin a step, a reset where an episode has ended. The noise
            # follows from seed and step, so that a step that is dropped changes no later draw.
            if not finished:
                with runtime.forked_rng("acting", args.seed, step):
                    if not envs.all_ended:
                        action, state = act(row, state)
                    else:
                        action = envs.random_actions()  # which a reset ignores
                envs.send(action)

            # Learn while they step. A resumed run makes up for updates that a signal prevented.
            owed = updates_owed(step, args)
            while learning and updates < owed and not interrupt.agreed():
                batch = replay.sample(batch_size, args.batch_length, fresh_first=True)
                losses = learn(batch)
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
