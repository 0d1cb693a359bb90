"""What a trained agent's dreams are worth, measured on a run folder; `inspect_run.py` shows it.

Everything here reads: a run that is still training is not disturbed, since the replay is mapped
without its lock and the checkpoint is the last whole one. Nothing from the folder is executed.
"""

import copy
import importlib.util
import re
import sys
from dataclasses import dataclass, replace
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
import runtime
from runtime import UserError

ROOT = Path(__file__).parent.parent


class Stored:
    """Stands for the replay where a checkpoint is read: the rows that it knows, nothing else."""

    start: int  # the oldest row
    end: int  # the row after the newest

    def load_state_dict(self, state):
        self.start = state["start"]
        self.end = state["end"]


@dataclass
class Run:
    """A run folder with its agent."""

    folder: Path
    script: ModuleType
    args: Any
    agent: torch.nn.ModuleDict
    replay: Stored
    counters: dict  # of the checkpoint
    device: torch.device

    @property
    def model(self):
        return self.agent["world_model"]

    @property
    def rssm(self):
        return self.model.rssm

    @property
    def frames(self):
        return self.counters["step"] * self.args.action_repeat

    @property
    def updates(self):
        return self.counters["updates"]


def load_script(path):
    """Imports a script from its file, once under its name; UserError if it is not of our kind."""
    path = Path(path).resolve()
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", "")).resolve() == path:
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    with runtime.explain(f"{path} cannot be imported", Exception):
        spec.loader.exec_module(module)
    if not hasattr(module, "Args") or not hasattr(module, "PRESETS"):
        raise UserError(f"{path} has no Args and PRESETS, as a copy of dreamerv2.py does")
    return module


def load_run(folder, script=None, env_id=None, cuda=True):
    """The agent of a run folder; UserError if the folder or its script cannot be used.

    Without `script` the repository's own script of the name that the folder has is taken, so that
    a folder from someone else cannot choose what is executed.
    """
    folder = Path(folder)
    with runtime.explain(f"{folder} is no run folder", Exception):
        name = yaml.safe_load((folder / "args.yaml").read_text())["exp_name"]
    if script is None and not re.fullmatch(r"dreamerv[123]", str(name)):
        raise runtime.UserError(f"{folder} is of {name}, no script of ours: give --script")
    script = Path(script or ROOT / f"{name}.py")
    for ours in ("common.py", "runtime.py"):
        beside = script.with_name(ours)
        if beside.exists() and beside.read_bytes() != (ROOT / ours).read_bytes():
            hint = f"copy {Path(__file__).parent} beside it and start that copy"
            raise UserError(f"{beside} is not what would be imported here: {hint}")
    module = load_script(script)
    argv = ["--evaluate", str(folder)]
    if env_id:
        argv += ["--env-id", env_id]
    args = runtime.parse_args(module.Args, module.PRESETS, common.choose_preset, argv)
    args.compile = False  # each of the many shapes here would be compiled anew
    device = runtime.setup(args.seed, cuda and args.cuda, False, args.threads)
    agent = module.make_agent(runtime.read_shapes(folder), args).to(device)
    replay = Stored()
    counters = runtime.load_checkpoint(folder, {"agent": agent, "replay": replay})
    return Run(folder, module, args, agent, replay, counters, device)


# Data: streams of rows as dicts of (T, B, ...), on the device


def play(run, episodes, first_index=20_000):
    """Fresh episodes under the sampled policy, one after another -> a stream with B = 1.

    Environments with index 20,000 and on: neither training nor evaluation has their seeds.
    """
    # With --eval-envs 0 there can be no more environments than in training.
    count = min(episodes, 8 if run.args.eval_envs else run.args.num_envs)
    # Each plays its share: the first ones to end would be the short ones.
    quota = np.bincount(np.arange(episodes) % count)
    envs = common.Envs(run.args, count, first_index=first_index)
    act = runtime.Captured(partial(run.script.policy, run.agent), run.device, False)
    state = run.rssm.initial(count)
    rows = [[] for _ in range(count)]  # of the episode that each is in
    stream = []
    returns = []
    with envs.evaluating():  # which bounds the length of episodes
        envs.send(envs.random_actions())  # a reset ignores them
        while quota.any():
            row, _ = envs.receive()
            for i in range(count):
                rows[i].append({k: v[i] for k, v in row.items()})
                if envs.ended[i] and quota[i]:
                    quota[i] -= 1
                    returns.append(float(envs.returns[i]))
                    stream += rows[i]
                    rows[i] = []
            action, state = act(row, state)
            envs.send(action)
    envs.close()
    batch = {k: np.stack([row[k] for row in stream])[:, None] for k in stream[0]}
    return tensors(batch, run.device), returns


def replayed(run, count, length, seed=0, last=None):
    """Windows of the replay as the checkpoint knows it, of its last rows if told how many."""
    rng = np.random.default_rng(seed)
    folder = run.folder / "replay"
    data = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
    written = int(data.pop("written")[0, 0])  # rows, of which a run may have overwritten some
    capacity = len(data["reward"])
    start = max(run.replay.start, written - capacity, run.replay.end - (last or capacity))
    room = run.replay.end - start - length + 1
    if room < 1:
        raise UserError(f"the replay of {run.folder} has no {length} rows")
    row = start + rng.integers(room, size=count)
    env = rng.integers(data["reward"].shape[1], size=count)
    index = (row + np.arange(length)[:, None]) % capacity
    return tensors({k: np.array(v[index, env]) for k, v in data.items()}, run.device)


def tensors(batch, device):
    return {k: torch.as_tensor(v, device=device) for k, v in batch.items()}


def rewards(run, batch):
    """Rewards as the model learns them."""
    tanh = getattr(run.args, "reward_transform", "none") == "tanh"  # V3 takes them as they are
    return torch.tanh(batch["reward"]) if tanh else batch["reward"]


@torch.no_grad()
def observe(run, batch):
    """Posterior and prior of a stream: dicts of (T, B, ...)."""
    chunks = [
        {k: v[t : t + 256] for k, v in batch.items()} for t in range(0, len(batch["reward"]), 256)
    ]
    embed = torch.cat([run.model.encoder(chunk) for chunk in chunks])  # images take memory
    return run.rssm.observe(embed, batch["action"], batch["is_first"])


def dreams_begin_at_the_start(run):
    """Whether a dream holds its start as well, as in V2 and V3, or what follows it, as in V1."""
    return "slow_critic" in run.agent


def values_have_the_reward_of_arriving(run):
    """Whether a state's value begins with the reward of having come there, as in V1 and V2.

    In V3 it begins with the next one.
    """
    return "return_range" not in run.agent


# Instruments


def latent_kl(run, post, prior):
    """KL(post || prior) of each latent variable: (..., S)."""
    p, q = run.rssm.dist(post), run.rssm.dist(prior)
    if isinstance(p, torch.distributions.Distribution):
        return torch.distributions.kl_divergence(p, q)
    return (p.probs * (p.logp - q.logp)).sum(-1)


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
    rollout, in nats. A pair counts as long as the rollout has not come to an end: imagination gives
    no weight to what lies behind one that it predicts.
    """
    post, _ = observe(run, batch)
    reward = rewards(run, batch)
    length = len(reward)
    episode = batch["is_first"].float().cumsum(0)
    real = batch["is_first"] == 0  # the reward of a reset row is no prediction
    mean = reward[real].mean()
    ends = batch["is_terminal"]
    rate = 1 - ends[real].mean()
    state = {k: post[k] for k in ("deter", "stoch")}
    alive = torch.ones_like(reward)  # the probability that the rollout has not ended before
    rng = np.random.default_rng(0)
    keys = [k for k in ("vector", "image") if k in batch]
    curves = {}

    def note(name, value):
        curves.setdefault(name, []).append(float(value))

    for h in range(min(horizon, length - 1) + 1):
        if h:
            flat = {k: v[: length - h].flatten(0, 1) for k, v in state.items()}
            step = run.rssm.img_step(flat, batch["action"][h:].flatten(0, 1))
            shape = batch["reward"][h:].shape
            state = {k: v.unflatten(0, shape) for k, v in step.items()}
            later = {k: v[h:] for k, v in post.items() if k not in ("deter", "stoch")}
            alive = alive[:-1]
        valid = (episode[h:] == episode[: length - h]) & real[h:] & (alive > 0.5)
        if not valid.any():
            break
        feat = run.rssm.feat(state)
        if run.model.discount:
            alive = alive * continuation(run, feat)
        note("pairs", valid.sum())
        note("reward", (run.model.reward(feat) - reward[h:]).square()[valid].mean())
        note("reward_trivial", (mean - reward[h:]).square()[valid].mean())
        note("kl", latent_kl(run, later, state).sum(-1)[valid].mean() if h else 0.0)
        if run.model.discount:
            goes_on = 1 - ends[h:]
            note("continuation", (continuation(run, feat) - goes_on).square()[valid].mean())
            note("continuation_trivial", (rate - goes_on).square()[valid].mean())
        if keys:  # of some pairs, for decoding is dear
            picked = torch.as_tensor(rng.permutation(int(valid.sum()))[:images])
            recon = run.model.decoder(feat[valid][picked])
            for key in keys:
                now = reconstructed(run, key, batch[key][h:][valid][picked])
                before = reconstructed(run, key, batch[key][: length - h][valid][picked])
                axes = tuple(range(1, now.ndim))
                note(key, (recon[key] - now).square().sum(axes).mean())
                note(f"{key}_trivial", (before - now).square().sum(axes).mean())
    return curves


def reconstructed(run, key, truth):
    """An observation as the decoder has it; V3's gives symlog of vectors."""
    if key == "image":
        return run.script.pixels(truth)
    return run.script.symlog(truth) if hasattr(run.script, "symlog") else truth


def evidence(batch):
    """How many rows tell something of rewards, and of ends: those that are not as most are."""
    reward = batch["reward"][batch["is_first"] == 0]
    unusual = reward != reward.flatten().mode().values
    return {"rewards": int(unusual.sum()), "ends": int(batch["is_terminal"].sum())}


@torch.no_grad()
def explained_variance(run, batch):
    """The share of the variance of observations that reconstructions explain: dict of floats."""
    post, _ = observe(run, batch)
    shares = {}
    for key, recon in run.model.decoder(run.rssm.feat(post)).items():
        truth = reconstructed(run, key, batch[key])
        spread = (truth - truth.mean((0, 1))).square().mean()
        shares[key] = float(1 - (recon - truth).square().mean() / spread.clamp(min=1e-12))
    return shares


def reward_errors(curves, horizon):
    """Those of `horizon_curves` after 1, 5 and the imagined steps, and always saying the mean."""
    errors = curves.get("reward", [])
    picked = {str(h): errors[h] for h in (1, 5, horizon) if h < len(errors)}
    if errors:
        picked["mean"] = curves["reward_trivial"][0]
    return picked


def predictable(curves, name="reward"):
    """The number of steps up to which the error stays below half of the trivial predictor's.

    -1 if it is above even with eyes open, None if there is nothing to predict.
    """
    if name not in curves or curves[f"{name}_trivial"][0] < 1e-6:
        return None
    good = np.array(curves[name]) < 0.5 * np.array(curves[f"{name}_trivial"])
    return int(np.argmin(good)) - 1 if not good.all() else len(good) - 1


def discounted_returns(run, batch, values):
    """Discounted returns that really followed, counted as the values of the script count them.

    (T, B) rows, values (T, B) -> returns (T, B), and the share of each that is a value: where time
    ran out, or the rows end, the last state's value stands for what would have come.
    """
    reward = rewards(run, batch)
    none = torch.zeros_like(reward)
    counts_arrival = values_have_the_reward_of_arriving(run)
    at_arrival = reward if counts_arrival else none
    at_leaving = none if counts_arrival else reward
    gamma = run.args.gamma
    first = batch["is_first"] != 0
    ends = batch["is_terminal"] != 0
    returns = torch.where(ends, at_arrival, values)  # of last rows, as is the share
    share = (~ends).float()
    for t in reversed(range(len(reward) - 1)):
        goes_on = ~first[t + 1]
        later = at_arrival[t] + at_leaving[t + 1] + gamma * returns[t + 1]
        returns[t] = torch.where(goes_on, later, returns[t])
        share[t] = torch.where(goes_on, gamma * share[t + 1], share[t])
    return returns, share


def behavior_loss(run, post, is_terminal, args):
    """That of the run's script; it names the networks as the agent does."""
    networks = dict(run.agent.items())
    if "return_range" in networks:  # measuring must not move it
        networks["return_range"] = copy.deepcopy(networks["return_range"])
    return run.script.behavior_loss(**networks, post=post, is_terminal=is_terminal, args=args)


@torch.no_grad()
def imagined_returns(run, post, is_terminal, horizon):
    """Lambda-returns of the first states of dreams, from starts (T, 1): what the actor goes by.

    The script's `lambda_return` is watched while its loss is computed.
    """
    torch.manual_seed(0)
    original = run.script.lambda_return
    seen = []

    def record(*args):
        seen.append(original(*args))
        return seen[-1]

    # With reinforce no gradient is kept; the returns are the same.
    changes = {"imag_horizon": max(2, horizon), "actor_grad": "reinforce"}
    kept = vars(run.args)
    args = type(run.args)(**kept | {k: v for k, v in changes.items() if k in kept})
    run.script.lambda_return = record
    try:
        behavior_loss(run, post, is_terminal, args)
    finally:
        run.script.lambda_return = original
    return seen[0][0]


@torch.no_grad()
def replay_optimism(run, windows):
    """How much more the values promise than what followed in the windows, as a share of it.

    Beyond the windows the value of their last row stands for what followed. It carries the same
    bias, so that the difference is set against the share of rewards in what followed. The actions
    are those of older policies: a policy that improves looks optimistic. None if all are resets.
    """
    counts = windows["is_first"] == 0
    if not counts.any():
        return None
    post, _ = observe(run, windows)
    values = run.agent["critic"](run.rssm.feat(post))
    truth, share = discounted_returns(run, windows, values)
    bias = (values - truth)[counts].mean() / (1 - share)[counts].mean().clamp(min=1e-6)
    return float(bias / truth[counts].abs().mean().clamp(min=1e-6))


@torch.no_grad()
def optimism(run, batch):
    """Values and dreamt returns at visited states against what followed: a dict of numbers.

    States count where at most half of what followed is itself a value, or all if there is no such
    one.
    """
    post, _ = observe(run, batch)
    values = run.agent["critic"](run.rssm.feat(post))
    truth, share = (x[:, 0] for x in discounted_returns(run, batch, values))
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
    # Where all states are worth nearly the same, their order says nothing.
    alike = np.ptp(value) == 0 or np.ptp(truth) < 0.05 * scale
    rank = None if alike else float(scipy.stats.spearmanr(value, truth).statistic)
    result["rank_correlation"] = rank
    result |= dreamt_returns(run, post, batch["is_terminal"], counts)
    result["gain"] = (result["return_full_horizon"] - result["return_random"]) / scale
    return result


def dreamt_returns(run, post, is_terminal, counts):
    """Mean returns of dreams of half, full and double length, and of random actions.

    post, is_terminal: of a stream with B = 1; counts: (T,), the states that dreams begin at, 1024
    at most; in V1, whose dreams lack the start, one step earlier.
    """
    index = counts.nonzero()[:, 0].cpu()
    index = index[torch.as_tensor(np.random.default_rng(0).permutation(len(index))[:1024])]
    if not dreams_begin_at_the_start(run):
        index = index - 1  # of the same episode, for no counted row is a reset
        if run.model.discount:  # and V1 drops the last row of a window then
            index = torch.cat([index, index[-1:]])
    starts = {k: v[index] for k, v in post.items()}
    ends = is_terminal[index]
    result = {}
    for name, horizon in horizons(run).items():
        returns = imagined_returns(run, starts, ends, horizon)
        result[f"return_{name}_horizon"] = float(returns.mean())
    networks = torch.nn.ModuleDict(dict(run.agent.items()))
    networks["actor"] = uniform_policy(run.agent["actor"])
    random = replace(run, agent=networks)
    returns = imagined_returns(random, starts, ends, run.args.imag_horizon)
    result["return_random"] = float(returns.mean())
    return result


def uniform_policy(actor):
    """A copy of an actor whose outputs are all zero: the same wide distribution in every state."""
    actor = copy.deepcopy(actor)
    for layer in (actor.out, getattr(actor, "std", actor.out)):
        layer.weight.zero_()
        layer.bias.zero_()
    return actor


def horizons(run):
    """Half, full and double the imagined steps, two at least."""
    full = run.args.imag_horizon
    return {"half": max(2, full // 2), "full": full, "double": 2 * full}


@torch.no_grad()
def log_likelihood(run, windows):
    """Of the windows' actions under the present policy, the median."""
    feat = run.rssm.feat(observe(run, windows)[0])
    dist = run.agent["actor"](feat[:-1])
    real = windows["is_first"][1:] == 0
    return float(dist.log_prob(windows["action"][1:])[real].median())


@torch.no_grad()
def drift(run, windows, horizon):
    """How far the policy has gone from what the model was trained on.

    The share of states dreamt `horizon` steps ahead whose nearest posterior state of the windows
    is farther than 95 % of posterior states are from theirs in other windows. The distance is
    Euclidean, of features scaled to unit variance. Dreams that have come to an end do not count;
    0 if all have.
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
    last = dreamt[-1]
    if run.model.discount:
        last = last[continuation(run, dreamt[:-1]).prod(0) > 0.5]
    far = torch.cdist((last - mean) / std, known).min(1).values
    return float((far > usual.quantile(0.95)).float().mean()) if len(last) else 0.0


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

    `uninformed_kl` is that of the posterior from the best guess that knows nothing: its average.
    """
    with torch.no_grad():
        post, prior = observe(run, batch)
        kl = latent_kl(run, post, prior).flatten(0, 1).mean(0)
        uninformed_kl = latent_kl(run, post, average(post)).sum(-1).mean()
        entropy = {}
        for name, stats in (("post", post), ("prior", prior)):
            entropy[name] = float(run.rssm.dist(stats).entropy().sum(-1).mean())
        dead = collapsed(post)
    torch.manual_seed(0)
    model_loss, post, _ = run.model.loss(batch)
    actor_loss, critic_loss, *rest = behavior_loss(run, post, batch["is_terminal"], run.args)
    if hasattr(run.script, "replay_critic_loss"):  # in V3 it trains model and critic as well
        networks = (run.rssm, run.agent["critic"], run.agent["slow_critic"])
        loss = run.script.replay_critic_loss(*networks, post, rest[0], batch, run.args)
        model_loss = model_loss + run.args.replay_critic * loss
        critic_loss = critic_loss + run.args.replay_critic * loss
    model_loss.backward(inputs=[*run.model.parameters()], retain_graph=True)
    norms = {f"world_model.{k}": gradient_norm(m) for k, m in run.model.named_children()}
    for name, loss in {"actor": actor_loss, "critic": critic_loss}.items():
        loss.backward(inputs=[*run.agent[name].parameters()], retain_graph=True)
        norms[name] = gradient_norm(run.agent[name])
    run.agent.zero_grad()
    return {
        "entropy": entropy, "kl": kl.tolist(), "collapsed": dead,
        "gradient_norms": norms, "uninformed_kl": float(uninformed_kl), "latents": len(kl),
    }  # fmt: skip


def gradient_norm(module):
    grads = [p.grad.norm() for p in module.parameters() if p.grad is not None]
    return float(torch.stack(grads).norm()) if grads else 0.0
