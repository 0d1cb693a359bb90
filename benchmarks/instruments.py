"""What a trained agent's dreams are worth, measured on a run folder; `inspect_run.py` shows it.

Everything here reads: a run that is still training is not disturbed, since the replay is mapped
without its lock and the checkpoint is the last whole one. Nothing from the folder is executed.
The scripts themselves log `diagnose` every --diagnose-every updates, through common.Logger. It is
here, and not in them, because no paper has it and nobody needs it to follow the algorithm.
"""

import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.stats
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

ROOT = Path(__file__).parent.parent


@dataclass
class Run:
    """A run folder with its agent."""

    folder: Path | None
    script: ModuleType
    args: Any
    agent: torch.nn.ModuleDict
    options: dict  # of common.make_envs
    state: dict  # the checkpoint
    device: torch.device

    @property
    def model(self):
        return self.agent["world_model"]

    @property
    def rssm(self):
        return self.model.rssm

    @property
    def frames(self):
        return self.state["counters"][0] * self.args.action_repeat

    @property
    def updates(self):
        return self.state["counters"][1]


def load_script(path):
    """Imports a script from its file, once under its name."""
    path = Path(path).resolve()
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", "")).resolve() == path:
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_run(folder, script=None, env_id=None, cuda=True):
    """The agent of a run folder; UserError if the folder or its script cannot be used.

    Without `script` the repository's own script of the name that the folder has is taken, so that
    a folder from someone else cannot choose what is executed.
    """
    folder = Path(folder)
    with common.explain(f"{folder} is no run folder", Exception):
        name = yaml.safe_load((folder / "args.yaml").read_text())["exp_name"]
        if script is None and not re.fullmatch(r"dreamerv[12]", str(name)):
            raise ValueError(f"no script of ours is named {name}, give --script")
    module = load_script(script or ROOT / f"{name}.py")
    argv = ["--evaluate", str(folder), *(["--env-id", env_id] if env_id else [])]
    args = common.parse_args(module.Args, module.PRESETS, argv)
    args.observation = "pixels" if args.pixels else args.observation
    device = common.setup(args.seed, cuda and args.cuda, False, args.threads)
    names = "env_id seed observation grayscale action_repeat time_limit sticky_prob"
    options = {k: getattr(args, k) for k in (*names.split(), "full_action_space")}
    envs = common.make_envs(1, **options)
    shapes, discrete = {k: shape for k, (shape, _) in envs.shapes.items()}, envs.discrete
    envs.close()
    continuous = "tanh_normal" if module.__name__ == "dreamerv1" else "trunc_normal"
    grad = "dynamics" if module.__name__ == "dreamerv1" or not discrete else "reinforce"
    auto = {"precision": "float32", "actor_dist": "onehot" if discrete else continuous}
    auto["actor_grad"] = grad
    vars(args).update({k: v for k, v in auto.items() if getattr(args, k, None) == "auto"})
    agent = module.make_agent(shapes, args).to(device)
    state = common.load_checkpoint(folder, {"agent": agent})
    return Run(folder, module, args, agent, options, state, device)


# Data: streams of rows as dicts of (T, B, ...), on the device


def play(run, episodes, first_index=20_000):
    """Fresh episodes under the sampled policy, one after another -> a stream with B = 1.

    Environments with index 20,000 and on: neither training nor evaluation has their seeds.
    """
    count, streams, finished = min(episodes, 8), [], []
    # Each plays its share: the first ones to end would be the short ones.
    quota = np.bincount(np.arange(episodes) % count)
    envs = common.make_envs(count, first_index=first_index, **run.options)
    state, done = run.rssm.initial(count), np.ones(count, bool)
    rows, action = [[] for _ in range(count)], np.zeros(envs.action_space.shape, np.float32)
    act = common.Captured(partial(run.script.policy, run.agent), run.device, False)
    while quota.any():
        row, done, info = common.step_rows(envs, action, done)
        for i in range(count):
            rows[i].append({k: v[i] for k, v in row.items()})
            if done[i] and quota[i]:
                quota[i] -= 1
                finished.append(float(info["episode"]["r"][i]))
                streams.append(rows[i])
                rows[i] = []
        action, state = act(row, state)
        action = action.cpu().numpy()
    envs.close()
    stream = [row for episode in streams for row in episode]
    batch = {k: np.stack([row[k] for row in stream])[:, None] for k in stream[0]}
    return tensors(batch, run.device), finished


def replayed(run, count, length, seed=0, last=None):
    """Windows of the replay as the checkpoint knows it, of its last rows if told how many."""
    ring, rng = run.state["replay"], np.random.default_rng(seed)
    paths = sorted((run.folder / "replay").glob("*.npy"))
    data = {p.stem: np.load(p, mmap_mode="r") for p in paths if p.stem != "written"}
    capacity = len(data["reward"])
    written = np.load(run.folder / "replay" / "written.npy")[0, 0]
    start = max(ring["start"], int(written) - capacity, ring["end"] - (last or capacity))
    room = ring["end"] - start - length + 1
    if room < 1:
        raise common.UserError(f"the replay of {run.folder} has no {length} rows")
    row = start + rng.integers(room, size=count)
    env = rng.integers(data["reward"].shape[1], size=count)
    index = (row + np.arange(length)[:, None]) % capacity
    return tensors({k: np.array(v[index, env]) for k, v in data.items()}, run.device)


def tensors(batch, device):
    return {k: torch.as_tensor(v, device=device) for k, v in batch.items()}


def rewards(run, batch):
    """Rewards as the model learns them."""
    return torch.tanh(batch["reward"]) if run.args.reward_transform == "tanh" else batch["reward"]


@torch.no_grad()
def observe(run, batch):
    """Posterior and prior of a stream: dicts of (T, B, ...)."""
    chunks = [
        {k: v[t : t + 256] for k, v in batch.items()} for t in range(0, len(batch["reward"]), 256)
    ]
    embed = torch.cat([run.model.encoder(chunk) for chunk in chunks])  # images take memory
    return run.rssm.observe(embed, batch["action"], batch["is_first"])


def dreams_begin_at_the_start(run):
    """Whether imagination returns the start as well, as in V2, or what follows it, as in V1."""
    return "slow_critic" in run.agent


# Instruments


def latent_kl(run, post, prior):
    """KL(post || prior) of each latent variable: (..., S)."""
    p, q = run.rssm.dist(post), run.rssm.dist(prior)
    if isinstance(p, torch.distributions.Distribution):
        return torch.distributions.kl_divergence(p, q)
    return (p.probs * (p.logits - q.logits)).sum(-1)


def continuation(run, feat):
    """Predicted probability that an episode goes on: (...); the head's target holds gamma."""
    return (torch.sigmoid(run.model.discount(feat)) / run.args.gamma).clamp(max=1)


@torch.no_grad()
def horizon_curves(run, batch, horizon, images=256):
    """Prior rollouts from every posterior state, under the actions that were really taken.

    batch (T, B, ...) -> dict of name -> [value after h steps, h = 0 to horizon], h = 0 being the
    posterior itself. Only pairs of rows of one episode count; `pairs` tells how many there were.
    reward, vector, image: mean squared errors (vectors and images summed over their entries), each
    with what a trivial predictor would have: the mean reward of the batch, the last observation.
    continuation: Brier score, beside that of the mean rate. kl: of the posterior that came from the
    rollout, in nats.
    """
    post, _ = observe(run, batch)
    length, reward = len(batch["reward"]), rewards(run, batch)
    episode = batch["is_first"].float().cumsum(0)
    real = batch["is_first"] == 0  # the reward of a reset row is no prediction
    mean = reward[real].mean()
    ends = batch["is_terminal"]
    rate = 1 - ends[real].mean()
    state = {k: post[k] for k in ("deter", "stoch")}
    rng = np.random.default_rng(0)
    curves, keys = {}, [k for k in ("vector", "image") if k in batch]

    def note(name, value):
        curves.setdefault(name, []).append(float(value))

    for h in range(min(horizon, length - 1) + 1):
        if h:
            flat = {k: v[: length - h].flatten(0, 1) for k, v in state.items()}
            step = run.rssm.img_step(flat, batch["action"][h:].flatten(0, 1))
            shape = batch["reward"][h:].shape
            state = {k: v.unflatten(0, shape) for k, v in step.items()}
            later = {k: v[h:] for k, v in post.items() if k not in ("deter", "stoch")}
        valid = (episode[h:] == episode[: length - h]) & real[h:]
        if not valid.any():
            break
        feat = run.rssm.feat(state)
        note("pairs", valid.sum())
        note("reward", (run.model.reward(feat) - reward[h:]).square()[valid].mean())
        note("reward_trivial", (mean - reward[h:]).square()[valid].mean())
        note("kl", latent_kl(run, later, state).sum(-1)[valid].mean() if h else 0.0)
        if run.model.discount:
            goes_on = 1 - ends[h:]
            note("continuation", (continuation(run, feat) - goes_on).square()[valid].mean())
            note("continuation_trivial", (rate - goes_on).square()[valid].mean())
        if keys and images:  # of some pairs, for decoding is dear
            picked = torch.as_tensor(rng.permutation(int(valid.sum()))[:images])
            recon = run.model.decoder(feat[valid][picked])
            for key in keys:
                pixel = run.script.pixels if key == "image" else torch.Tensor.float
                now = pixel(batch[key][h:][valid][picked])
                before = pixel(batch[key][: length - h][valid][picked])
                axes = tuple(range(1, now.ndim))
                note(key, (recon[key] - now).square().sum(axes).mean())
                note(f"{key}_trivial", (before - now).square().sum(axes).mean())
    return curves


def predictable(curves, name="reward"):
    """The number of steps up to which the error stays below half of the trivial predictor's.

    -1 if it is above even with eyes open, None if there is nothing to foretell.
    """
    if name not in curves or curves[f"{name}_trivial"][0] < 1e-6:
        return None
    good = np.array(curves[name]) < 0.5 * np.array(curves[f"{name}_trivial"])
    return int(np.argmin(good)) - 1 if not good.all() else len(good) - 1


def followed(run, batch, values):
    """Discounted returns that really followed, with the reward of arriving as the values have it.

    (T, B) rows, values (T, B) -> returns (T, B), and the share of each that is a value: where time
    ran out, or the rows end, the last state's value stands for what would have come.
    """
    reward, gamma = rewards(run, batch), run.args.gamma
    first, ends = batch["is_first"] != 0, batch["is_terminal"] != 0
    returns, share = torch.where(ends, reward, values), (~ends).float()  # of last rows
    for t in reversed(range(len(reward) - 1)):
        goes_on = ~first[t + 1]
        later = reward[t] + gamma * returns[t + 1]
        returns[t] = torch.where(goes_on, later, returns[t])
        share[t] = torch.where(goes_on, gamma * share[t + 1], share[t])
    return returns, share


@torch.no_grad()
def imagined_returns(run, post, is_terminal, horizon):
    """Lambda-returns of the first states of dreams, from starts (T, 1): what the actor goes by."""
    seen, original = [], run.script.lambda_return

    def record(*args):
        seen.append(original(*args))
        return seen[-1]

    # With reinforce no gradient is kept; the returns are the same.
    changes = {"imag_horizon": max(2, horizon), "actor_grad": "reinforce"}
    args = type(run.args)(**vars(run.args) | changes)
    critics = [module for name, module in run.agent.items() if name != "world_model"]
    run.script.lambda_return = record
    try:
        run.script.behavior_loss(run.model, *critics, post, is_terminal, args)
    finally:
        run.script.lambda_return = original
    return seen[0][0]


@torch.no_grad()
def optimism(run, batch):
    """Values and dreamt returns at visited states against what followed: a dict of numbers.

    States count where at most half of what followed is itself a value (see `followed`), or all if
    there is no such one. Dreams begin at 1024 of them at most; in V1, whose dreams lack the start,
    one step earlier.
    """
    post, _ = observe(run, batch)
    values = run.agent["critic"](run.rssm.feat(post))
    truth, share = (x[:, 0] for x in followed(run, batch, values))
    values = values[:, 0]
    counts = (share <= 0.5) & (batch["is_first"][:, 0] == 0)
    if not counts.any():  # every episode is short of its horizon: all states, said so
        counts = batch["is_first"][:, 0] == 0
    value, truth = values[counts].cpu().numpy(), truth[counts].cpu().numpy()
    result = {"states": int(counts.sum()), "value_share": float(share[counts].mean())}
    scale = float(np.abs(truth).mean()) or 1.0
    result |= {"value": float(value.mean()), "followed": float(truth.mean())}
    result["bias"] = float((value - truth).mean())
    result["optimism"] = result["bias"] / scale
    constant = np.ptp(value) == 0 or np.ptp(truth) == 0
    rank = None if constant else float(scipy.stats.spearmanr(value, truth).statistic)
    result["rank_correlation"] = rank
    index = counts.nonzero()[:, 0].cpu()
    index = index[torch.as_tensor(np.random.default_rng(0).permutation(len(index))[:1024])]
    if not dreams_begin_at_the_start(run):
        index = index - 1  # of the same episode, for no counted row is a reset
        if run.model.discount:  # and V1 drops the last row of a window then
            index = torch.cat([index, index[-1:]])
    chosen = {k: v[index] for k, v in post.items()}
    ends = batch["is_terminal"][index]
    for name, horizon in horizons(run).items():
        torch.manual_seed(0)
        result[f"return_{name}_horizon"] = float(
            imagined_returns(run, chosen, ends, horizon).mean()
        )
    return result


def horizons(run):
    """Half, full and double the imagined steps, two at least."""
    full = run.args.imag_horizon
    return {"half": max(2, full // 2), "full": full, "double": 2 * full}


@torch.no_grad()
def log_likelihood(run, windows):
    """Of the windows' actions under the present policy, the median."""
    feat = run.rssm.feat(observe(run, windows)[0])
    dist, real = run.agent["actor"](feat[:-1]), windows["is_first"][1:] == 0
    return float(dist.log_prob(windows["action"][1:])[real].median())


@torch.no_grad()
def drift(run, windows, horizon):
    """How far the policy has gone from what the model was trained on.

    The share of states dreamt `horizon` steps ahead whose nearest posterior state of the windows
    is farther than 95 % of posterior states are from theirs in other windows. The distance is
    Euclidean, of features scaled to unit variance.
    """
    post, _ = observe(run, windows)
    feat = run.rssm.feat(post)
    half = feat.shape[1] // 2
    assert half, "it takes two windows"
    mean, std = feat.flatten(0, 1).mean(0), feat.flatten(0, 1).std(0) + 1e-6
    known, other = (
        ((x.flatten(0, 1) - mean) / std)[:4096] for x in feat.split([half, feat.shape[1] - half], 1)
    )
    usual = torch.cdist(other, known).min(1).values
    starts = {k: v[:, half:].flatten(0, 1)[:1024] for k, v in post.items()}
    torch.manual_seed(0)
    dreamt, _ = run.rssm.imagine(run.agent["actor"], starts, horizon)
    far = torch.cdist((dreamt[-1] - mean) / std, known).min(1).values
    return float((far > usual.quantile(0.95)).float().mean())


def average(post):
    """The average posterior over all states, with its shape, as statistics."""
    if "logit" in post:
        probs = post["logit"].softmax(-1).flatten(0, 1).mean(0)
        return {"logit": probs.log().expand_as(post["logit"])}
    mean, std = (post[k].flatten(0, 1) for k in ("mean", "std"))
    pooled = {"mean": mean.mean(0), "std": (mean.var(0) + std.square().mean(0)).sqrt()}
    return {k: v.expand_as(post[k]) for k, v in pooled.items()}


def collapsed(post):
    """The share of latents whose posterior hardly depends on the state.

    For categoricals, if the probabilities differ from their mean by less than 1 % (total variation,
    mean over states); for Gaussians, if the means vary by less than a tenth of the mean standard
    deviation.
    """
    if "logit" in post:
        probs = post["logit"].softmax(-1).flatten(0, 1)
        dead = 0.5 * (probs - probs.mean(0)).abs().sum(-1).mean(0) < 0.01
    else:
        means, stds = post["mean"].flatten(0, 1), post["std"].flatten(0, 1)
        dead = means.std(0) < 0.1 * stds.mean(0)
    return float(dead.float().mean())


def health(run, batch):
    """Entropies, KL of each latent, collapsed latents, and the gradient norm of each module.

    `uninformed` is the KL of the posterior from the best guess that knows nothing: its own average.
    """
    with torch.no_grad():
        post, prior = observe(run, batch)
        kl = latent_kl(run, post, prior).flatten(0, 1).mean(0)
        uninformed = latent_kl(run, post, average(post)).sum(-1).mean()
        entropy = {}
        for name, stats in (("post", post), ("prior", prior)):
            entropy[name] = float(run.rssm.dist(stats).entropy().sum(-1).mean())
        dead = collapsed(post)
    norms, agent = {}, run.agent
    torch.manual_seed(0)
    loss, post, _ = run.model.loss(batch)
    loss.backward()
    critics = [module for name, module in agent.items() if name != "world_model"]
    losses = run.script.behavior_loss(run.model, *critics, post, batch["is_terminal"], run.args)
    parts = {f"world_model.{k}": m for k, m in run.model.named_children()}
    for name, module in parts.items():
        norms[name] = gradient_norm(module)
    agent.zero_grad()
    for name, loss in zip(("actor", "critic"), losses[:2], strict=True):
        loss.backward(inputs=[*agent[name].parameters()], retain_graph=True)
        norms[name] = gradient_norm(agent[name])
    agent.zero_grad()
    return {
        "entropy": entropy, "kl": kl.tolist(), "collapsed": dead,
        "gradient_norms": norms, "uninformed": float(uninformed), "latents": len(kl),
    }  # fmt: skip


def gradient_norm(module):
    grads = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(grads).norm()) if grads else 0.0


@torch.no_grad()
def diagnose(agent, batch, args):
    """What the scripts log of the batch that they learned from, (T, B, ...): dict of tag -> number.

    diagnose/reward_error_N, with N 1, 5 and the imagination horizon: squared error of the rewards
    dreamt N steps ahead under the recorded actions, as in `horizon_curves`; reward_error_mean: that
    of always saying the batch's mean reward. value_optimism: how much more the values promise than
    what followed in the batch and the value of its last row, as a share of it; since that value
    would carry the same bias, the difference is set against the share of rewards in what followed.
    The actions are those of older policies, so that a policy that improves looks optimistic.
    collapsed_latents: see `collapsed`. Learning goes on as if nobody had looked.
    """
    script = sys.modules[type(agent["world_model"]).__module__]
    run = Run(None, script, args, agent, {}, {}, batch["reward"].device)
    counts, numbers = batch["is_first"] == 0, {}
    if not counts.any():
        return numbers
    gpus = [run.device] if run.device.type == "cuda" else []
    # Compiled steps would be compiled again for each of these shapes.
    with torch.random.fork_rng(gpus), torch.compiler.set_stance("force_eager"):
        post, _ = observe(run, batch)
        curves = horizon_curves(run, batch, args.imag_horizon, images=0)
    errors = curves["reward"]
    for steps in (1, 5, args.imag_horizon):
        if steps < len(errors):
            numbers[f"reward_error_{steps}"] = errors[steps]
    numbers["reward_error_mean"] = curves["reward_trivial"][0]
    values = agent["critic"](run.rssm.feat(post))
    truth, share = followed(run, batch, values)
    bias = (values - truth)[counts].mean() / (1 - share)[counts].mean().clamp(min=1e-6)
    numbers["value_optimism"] = float(bias / truth[counts].abs().mean().clamp(min=1e-6))
    numbers["collapsed_latents"] = collapsed(post)
    return {f"diagnose/{name}": value for name, value in numbers.items()}
