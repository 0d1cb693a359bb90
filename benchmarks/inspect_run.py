"""Asks a run folder, finished or still training: can the imagination be trusted, and how far?

    python benchmarks/inspect_run.py RUN            # RUN/report.html, one file, opens anywhere
    python benchmarks/inspect_run.py RUN --film     # RUN/videos/evaluate.gif, shows the return
    python benchmarks/inspect_run.py RUN --dream    # RUN/videos/dream.gif, all of it imagined

The report compares what the model predicts with what then happened: in fresh episodes, which the
agent plays for it and was never trained on, and in windows of its replay. `instruments.py` says
how each number is found; report.json, beside the report, has them all. Nothing that the folder
holds is executed: the script is this repository's own of the run's name, or the one of --script.
"""

import argparse
import base64
import html
import io
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import cv2
import health
import instruments as tools
import torch

import common
import runtime
from runtime import UserError

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem;
       color: #222; background: #fff; }
h1 { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; vertical-align: top; }
.pixels { image-rendering: pixelated; width: 100%; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.verdict { background: #f3f6fa; padding: .6rem 1rem; border-left: 4px solid #36c; }
pre { overflow-x: auto; background: #f6f6f6; padding: .6rem; font-size: .8rem; }
figure { margin: 1.2rem 0; } figcaption { color: #555; font-size: .9rem; }
"""


def measure(run, episodes, horizon, seed=0):
    """All numbers of the report, and the data that its pictures need."""
    torch.manual_seed(seed)
    length = run.args.batch_length
    imagined = run.args.imag_horizon
    fresh, returns = tools.play(run, episodes)
    windows = tools.replayed(run, 2 * run.args.batch_size, length, seed)
    part = {k: v[:5000] for k, v in fresh.items()}  # rows, for every one is a start
    recent = tools.replayed(run, run.args.batch_size, length, seed, last=10 * length)
    numbers = {
        "env_id": run.args.env_id, "script": run.script.__name__, "frames": run.frames,
        "updates": run.updates, "imag_horizon": imagined, "returns": returns,
        "fresh": tools.horizon_curves(run, part, horizon),
        "replay": tools.horizon_curves(run, windows, horizon),
        "optimism": tools.optimism(run, fresh),
        "replay_optimism": tools.replay_optimism(run, windows),
        "horizons": tools.horizons(run),
        "drift": {
            "far": tools.drift(run, windows, imagined),
            "log_likelihood": tools.log_likelihood(run, windows),
        },
        "recent_log_likelihood": tools.log_likelihood(run, recent),
        "health": tools.health(run, windows),
        "explained_variance": tools.explained_variance(run, windows),
        "evidence": {
            "rewards": tools.evidence(fresh)["rewards"], "ends": tools.evidence(windows)["ends"],
        },
    }  # fmt: skip
    sources = ("fresh", "replay")
    numbers["reward_errors"] = {k: tools.reward_errors(numbers[k], imagined) for k in sources}
    numbers["predictable"] = {k: tools.predictable(numbers[k]) for k in sources}
    numbers["predictable"]["ends"] = tools.predictable(numbers["replay"], "continuation")
    numbers["verdict"] = verdict(numbers)
    return numbers, fresh, windows


ENOUGH = 20  # rows that tell something of rewards or ends, below which nothing is concluded


def verdict(numbers):
    """What the numbers mean, in plain words: the faults, if any is found, then how far it sees."""
    found = faults(numbers)
    return (found or ["No fault is found."]) + description(numbers)


def faults(numbers):
    """What points to an error in a model, a loss or a setting: a list of sentences.

    Where there is little evidence there is no fault.
    """
    said = []
    horizon = numbers["imag_horizon"]
    value = numbers["optimism"]
    drift = numbers["drift"]["far"]
    kl = sum(numbers["health"]["kl"])
    uninformed_kl = numbers["health"]["uninformed_kl"]
    fresh = numbers["predictable"]["fresh"]
    replay = numbers["predictable"]["replay"]
    if max(numbers["explained_variance"].values()) < 0.5:
        said.append("It does not see: reconstructions explain less than half of the variance.")
    if numbers["health"]["collapsed"] == 1:
        said.append("No latent depends on what is seen.")
    if uninformed_kl > 0.1 and kl > 0.8 * uninformed_kl:
        said.append(
            f"The prior does not predict the posterior: it is {kl:.1f} nats away, a guess that"
            f" knows nothing {uninformed_kl:.1f}. It is untrained, or nothing can be predicted."
        )
    if fresh is not None and numbers["evidence"]["rewards"] >= ENOUGH:
        if fresh < 0:
            share = numbers["fresh"]["reward"][0] / numbers["fresh"]["reward_trivial"][0]
            said.append(
                f"The reward head fails even where the model sees: its squared error is {share:.0%}"
                " of that of the mean reward. It is untrained, or was fed other rewards."
            )
        elif max(fresh, replay or 0) < min(horizon / 2, len(numbers["fresh"]["reward"]) - 1):
            said.append(f"A horizon above {max(fresh, 1)} trains on fantasy; it is {horizon}.")
    ends = numbers["predictable"]["ends"]
    if ends is not None and ends < 0 and numbers["evidence"]["ends"] >= ENOUGH:
        said.append("Ends of episodes are predicted no better than by their rate.")
    if abs(value["optimism"]) > 0.5:
        more = "more" if value["optimism"] > 0 else "less"
        said.append(f"Values promise {abs(value['optimism']):.0%} {more} than what follows.")
    if value["gain"] < -0.02:
        said.append("In its own dreams the policy earns less than random actions.")
    if drift > 0.5:
        said.append(
            f"{drift:.0%} of the states that are dreamt {horizon} steps ahead lie far from all that"
            " was seen: the policy has left its model."
        )
    return said


def description(numbers):
    """How far rewards, or else ends, are predicted, and how right the values are."""
    said = []
    value = numbers["optimism"]
    steps = numbers["predictable"]["fresh"]
    what = "Rewards"
    far = len(numbers["fresh"]["reward"]) - 1
    count = numbers["evidence"]["rewards"]
    if steps is None:  # as where each step pays the same: what counts is then how long it lasts
        what = "Ends of episodes"
        steps = numbers["predictable"]["ends"]
        far = len(numbers["replay"]["reward"]) - 1
        count = numbers["evidence"]["ends"]
    if steps is None:
        said.append("Neither rewards nor ends vary here, so that their prediction says nothing.")
    elif count < ENOUGH:
        said.append(f"Few {what.lower()} seen, {count}: too few to judge their prediction.")
    elif steps < far:
        said.append(f"{what} stay predictable to {max(steps, 0)} steps.")
    else:
        said.append(f"{what} stay predictable to {steps} steps, as far as was looked.")
    side = "optimistic" if value["optimism"] > 0 else "pessimistic"
    size = abs(value["optimism"])
    rank = value["rank_correlation"]
    said.append(f"Values are {size:.0%} {side}" if size >= 0.05 else "Values are right within 5 %")
    said[-1] += "." if rank is None else f", with a rank correlation of {rank:.2f}."
    if value["value_share"] > 0.5:
        said.append("Episodes are too short for the discount: much of what followed is a guess.")
    if 0.25 < numbers["health"]["collapsed"] < 1:
        said.append(f"{numbers['health']['collapsed']:.0%} of the latents never change.")
    return said


def beside_good_runs(script, args, log):
    """Where the logged metrics leave the range of pinned runs, or why this cannot be said."""
    try:
        said, compared = health.outside(script, args, log)
    except ValueError as error:
        return [f"Not compared with good runs: {error}."]
    lines = [f"Outside of good runs: {line}." for line in said]
    return [f"Compared with {compared}.", *(lines or ["No metric leaves their range."])]


# Pictures


def figure_bytes(figure):
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return file.getvalue()


def draw_horizons(numbers):
    """Errors over the horizon, fresh episodes and replay, with the trivial predictors: PNGs."""
    from matplotlib import pyplot

    drawn = []
    for key in ("reward", "continuation", "vector", "image", "kl"):
        if key not in numbers["fresh"]:
            continue
        figure, axis = pyplot.subplots(figsize=(4.5, 3))
        for source, color in (("fresh", "tab:orange"), ("replay", "tab:blue")):
            left = np.array(numbers[source]["pairs"])
            far = max(1, int((left >= ENOUGH).sum()))
            curve = numbers[source][key][:far]
            axis.plot(range(len(curve)), curve, color=color, label=source)
            if key != "kl":
                trivial = numbers[source][f"{key}_trivial"][:far]
                axis.plot(range(len(trivial)), trivial, color=color, linestyle=":")
        axis.axvline(numbers["imag_horizon"], color="black", linewidth=0.6, linestyle="--")
        axis.set_title({"kl": "KL of posterior from rollout (nats)"}.get(key, f"{key}, error"))
        axis.set_xlabel("steps with eyes closed")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
        drawn.append(figure_bytes(figure))
    return drawn


def draw_three(numbers, log):
    """The three curves to look at before the horizon is extended: PNGs."""
    from matplotlib import pyplot

    figures = [pyplot.subplots(figsize=(4.5, 3)) for _ in range(3)]
    first, second, third = (axis for _, axis in figures)
    fresh, horizon, value = numbers["fresh"], numbers["imag_horizon"], numbers["optimism"]
    ratio = np.array(fresh["reward"]) / np.maximum(fresh["reward_trivial"], 1e-12)
    first.plot(ratio, color="tab:orange")
    first.axhline(0.5, color="black", linestyle=":", linewidth=0.8)
    first.axvline(horizon, color="black", linewidth=0.6, linestyle="--")
    first.set_title("1. reward error over the horizon", fontsize=10)
    first.set_xlabel("steps with eyes closed")
    first.set_ylabel("share of the trivial error")
    first.set_ylim(0, max(1.2, min(3, ratio.max())))
    if numbers["predictable"]["fresh"] is None:
        first.text(0.5, 0.8, "rewards do not vary", transform=first.transAxes, ha="center")
    rows = [row for row in log if "imag/value" in row]
    for key, label in (("imag/value", "value"), ("imag/return", "imagined return")):
        second.plot([row["frames"] for row in rows], [row[key] for row in rows], label=label)
    second.axhline(value["followed"], color="black", linestyle=":", linewidth=0.8)
    second.set_title("2. values over training", fontsize=10)
    second.set_xlabel("environment frames")
    second.legend(fontsize=8)
    labels = [f"H = {x}" for x in numbers["horizons"].values()]
    heights = [value[f"return_{name}_horizon"] for name in ("half", "full", "double")]
    third.bar(labels, heights, color="tab:orange")
    third.axhline(value["followed"], color="black", linestyle=":")
    third.set_title("3. imagined return at H/2, H and 2H", fontsize=10)
    return [figure_bytes(figure) for figure, _ in figures]


def draw_latents(run, batch):
    """Posterior latents over the first episode as a heat map: a PNG."""
    from matplotlib import pyplot

    first = (batch["is_first"][:, 0] != 0).nonzero()[:, 0].tolist()
    end = min([*first[1:2], len(batch["reward"]), 200])
    post, _ = tools.observe(run, {k: v[:end] for k, v in batch.items()})
    if "logit" in post:
        image = post["logit"].softmax(-1)[:, 0].flatten(1).T
        label = "latent and class"
    else:
        image, label = post["mean"][:, 0].T, "latent (mean)"
    figure, axis = pyplot.subplots(figsize=(9, 3.4))
    mesh = axis.imshow(image.cpu().numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(mesh)
    axis.set_xlabel("step of an episode")
    axis.set_ylabel(label)
    return figure_bytes(figure)


def draw_vectors(run, batch, context, horizon):
    """Dream against reality of vector observations in one episode: a PNG."""
    from matplotlib import pyplot

    first = (batch["is_first"][:, 0] != 0).nonzero()[:, 0].tolist()
    end = min([*first[1:2], len(batch["reward"]), context + horizon])
    part = {k: v[:end] for k, v in batch.items()}
    dreamt = run.model.decoder(dream_features(run, part, context))["vector"]
    if hasattr(run.script, "symexp"):  # V3 decodes symlogs
        dreamt = run.script.symexp(dreamt)
    dreamt, truth = (x[:, 0].detach().cpu().numpy() for x in (dreamt, part["vector"]))
    count = min(truth.shape[1], 6)
    figure, axes = pyplot.subplots(count, 1, figsize=(9, 1.3 * count), sharex=True, squeeze=False)
    for i, axis in enumerate(axes[:, 0]):
        axis.plot(truth[:, i], color="black", label="what happened")
        axis.plot(dreamt[:, i], color="tab:orange", label="seen, then dreamt")
        axis.axvline(context, color="black", linestyle="--", linewidth=0.6)
        axis.set_ylabel(f"[{i}]")
    axes[0, 0].legend(fontsize=8, ncols=2)
    axes[-1, 0].set_xlabel("step; dreamt after the dashed line")
    return figure_bytes(figure)


@torch.no_grad()
def dream_features(run, batch, context):
    """Sees `context` rows, then follows the actions blindly -> features (T, B, F)."""
    seen = {k: v[:context] for k, v in batch.items()}
    post, _ = tools.observe(run, seen)
    state = {k: v[-1] for k, v in post.items()}
    feats = [*run.rssm.feat(post)]
    for action in batch["action"][context:]:
        state = run.rssm.img_step(state, action)
        feats.append(run.rssm.feat(state))
    return torch.stack(feats)


def contact_sheet(film, every):
    """Every so many frames of an open-loop film (T, B, C, 3H, W), side by side -> (H, W, 3)."""
    frames = film[::every, 0].clamp(0, 1).cpu()
    row = torch.cat([*frames], -1).expand(3, -1, -1)
    return (row * 255).byte().permute(1, 2, 0).numpy()


def png(image):
    """(H, W, 3) uint8 as the bytes of a PNG."""
    return cv2.imencode(".png", np.ascontiguousarray(image[..., ::-1]))[1].tobytes()


def captioned(frame, text):
    """A frame (H, W, 3), at least 256 wide, with a line of text on it."""
    scale = -(-256 // frame.shape[1])
    frame = frame.repeat(scale, 0).repeat(scale, 1).copy()
    for color, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(frame, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, width, cv2.LINE_AA)
    return frame


def film_episode(run, limit=1000):
    """Plays an episode as evaluations do, with a seed that none of them has.

    -> frames with the return so far on them, the first `limit` ones, and the return
    """
    envs = common.Envs(run.args, 1, first_index=30_000, render=True)
    sample = getattr(run.args, "eval_sample", False)  # V1 and V2 evaluate the mode
    play = partial(run.script.policy, run.agent, sample=sample)
    act = runtime.Captured(play, run.device, False)
    state = run.rssm.initial(1)
    frames = []
    with envs.evaluating():  # which bounds its length
        action = envs.random_actions()  # a reset ignores them
        ended = False
        while not ended:
            envs.send(action)
            row, _ = envs.receive()
            total = float(envs.returns[0])
            if len(frames) < limit:
                frames.append(captioned(envs.render(), f"return {total:.1f}"))
            ended = envs.all_ended
            action, state = act(row, state)
    envs.close()
    return frames, total


@torch.no_grad()
def film_dream(run, batch, steps, context=5):
    """Imagination under the present policy from a real start -> frames, or UserError."""
    if "image" not in batch:
        raise UserError("--dream needs an agent that learns from images")
    seen = {k: v[:context] for k, v in batch.items()}
    post, _ = tools.observe(run, seen)
    start = {k: v[-1] for k, v in post.items()}
    feat, _ = run.rssm.imagine(run.agent["actor"], start, steps)
    feat = feat[1:] if tools.dreams_begin_at_the_start(run) else feat
    images = (run.model.decoder(feat)["image"] + 0.5).clamp(0, 1)[:, 0]
    rewards = run.model.reward(feat)[:, 0].cumsum(0)
    images = (images.expand(-1, 3, -1, -1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [
        captioned(image, f"dreamt return {total:.1f}")
        for image, total in zip(images, rewards.tolist(), strict=True)
    ]


# The report


def inline(data, kind="png", css=""):
    code = base64.b64encode(data).decode()
    return f'<img class="{css}" alt="" src="data:image/{kind};base64,{code}">'


def figure(data, caption, kind="png", css=""):
    images = data if isinstance(data, list) else [data]
    images = "".join(inline(image, kind, css) for image in images)
    return f"<figure>{images}<figcaption>{caption}</figcaption></figure>"


def steps_text(steps):
    """What `instruments.predictable` gives, for people."""
    if steps is None:
        return "they do not vary"
    return "not at all" if steps < 0 else str(steps)


def rows(pairs):
    cells = "".join(f"<tr><td>{k}</td><td>{v}</td></tr>" for k, v in pairs)
    return f"<table>{cells}</table>"


def error_rows(numbers):
    """Reward errors after some steps, of fresh episodes and of the replay, as rows of a table."""
    errors = numbers["reward_errors"]
    for key in errors["fresh"]:
        name = "reward error of the mean" if key == "mean" else f"reward error, steps: {key}"
        cells = [f"{errors[k][key]:.3g}" if key in errors[k] else "-" for k in ("fresh", "replay")]
        yield f"{name}; fresh, replay", ", ".join(cells)


def report(run, numbers, fresh, windows, log):
    """The page, as text."""
    value = numbers["optimism"]
    latents = numbers["health"]
    steps = numbers["predictable"]
    ends = steps_text(steps["ends"])
    if numbers["evidence"]["ends"] < ENOUGH:
        ends = f"not judged, {numbers['evidence']['ends']} ends seen"
    rank = value["rank_correlation"]
    replay_bias = "unknown"
    if numbers["replay_optimism"] is not None:
        replay_bias = f"{numbers['replay_optimism']:+.0%}"
    args = html.escape((run.folder / "args.yaml").read_text())
    title = html.escape(f"{numbers['script']} on {numbers['env_id']}")
    parts = [f"<h1>{title}</h1><p>{numbers['frames']:,} frames, {numbers['updates']:,} updates. "]
    returns = numbers["returns"]
    parts.append(
        f"{len(returns)} fresh episodes with sampled actions returned"
        f" {np.mean(returns):.1f} &plusmn; {np.std(returns):.1f}.</p>"
    )
    parts.append(f'<div class="verdict">{"<br>".join(map(html.escape, numbers["verdict"]))}</div>')
    parts.append("<h2>Three curves before you extend the horizon</h2>")
    parts.append(
        figure(
            draw_three(numbers, log),
            "1: above the dotted line the model predicts rewards worse than half of what the mean"
            " reward would do; dashed is the horizon. 2: values far above what follows are"
            " optimism; dotted is what follows now. 3: if the return at H is not closer to the"
            " dotted line than at H/2, a longer horizon adds nothing but error.",
        )
    )
    parts.append("<h2>How far it sees</h2>")
    parts.append(
        figure(
            draw_horizons(numbers),
            "Squared errors of rollouts of the prior under the actions really taken, from posterior"
            " states. Dotted: the mean reward, the mean rate, the last observation. Fresh episodes"
            " were never trained on. A curve ends where fewer than 20 rollouts are left.",
        )
    )
    parts.append(rows([
        ("rewards predictable to, fresh episodes (steps)", steps_text(steps["fresh"])),
        ("the same, replay", steps_text(steps["replay"])),
        *error_rows(numbers),
        ("ends of episodes predictable to, replay", ends),
    ]))  # fmt: skip
    context = 5
    length = min(len(fresh["reward"]), context + len(numbers["fresh"]["reward"]))
    if "image" in fresh:
        film = run.model.open_loop({k: v[:, :6] for k, v in windows.items()})
        (run.folder / "videos").mkdir(exist_ok=True)
        path = run.folder / "videos" / "open_loop_report.gif"
        runtime.save_gif(path, film)
        parts.append("<h2>Dream against reality</h2>")
        text = "Top: what happened. Middle: five frames seen, then dreamt. Bottom: the difference."
        parts.append(figure(path.read_bytes(), text, "gif", "pixels"))
        sheet = png(contact_sheet(film, max(1, len(film) // 12)))
        (run.folder / "videos" / "contact_sheet.png").write_bytes(sheet)
        parts.append(figure(sheet, "The first of them, some frames side by side.", css="pixels"))
    if "vector" in fresh:
        parts.append("<h2>Dream against reality, vectors</h2>")
        text = "An episode: five rows seen, then dreamt under the actions really taken."
        parts.append(figure(draw_vectors(run, fresh, context, length), text))
    parts.append("<h2>Values</h2>")
    parts.append(rows([
        ("value of visited states, mean", f"{value['value']:.2f}"),
        ("what really followed, discounted, mean", f"{value['followed']:.2f}"),
        ("bias", f"{value['bias']:+.2f} ({value['optimism']:+.0%})"),
        ("bias in windows of the replay, played by older policies", replay_bias),
        ("rank correlation", "none" if rank is None else f"{rank:.2f}"),
        ("imagined return at H/2, H, 2H", ", ".join(
            f"{value[f'return_{k}_horizon']:.2f}" for k in ("half", "full", "double"))),
        ("imagined return of random actions", f"{value['return_random']:.2f}"),
        ("states", value["states"]),
    ]))  # fmt: skip
    parts.append("<h2>Policy and model</h2>")
    parts.append(rows([
        ("log-likelihood of replayed actions, per step",
         f"{numbers['drift']['log_likelihood']:.2f}"),
        ("of the latest ones", f"{numbers['recent_log_likelihood']:.2f}"),
        ("dreamt states far from all that was seen", f"{numbers['drift']['far']:.0%}"),
    ]))  # fmt: skip
    parts.append("<h2>Metrics beside those of good runs</h2>")
    parts.append(f"<p>{'<br>'.join(map(html.escape, numbers['outside']))}</p>")
    parts.append("<h2>Latents</h2>")
    parts.append(figure(draw_latents(run, fresh), "The posterior in an episode."))
    parts.append(rows([
        ("entropy of posterior, prior (nats)",
         f"{latents['entropy']['post']:.2f}, {latents['entropy']['prior']:.2f}"),
        ("KL, sum and largest of a latent (nats)",
         f"{sum(latents['kl']):.2f}, {max(latents['kl']):.2f}"),
        ("KL of the posterior from its own average", f"{latents['uninformed_kl']:.2f}"),
        ("latents that never change", f"{latents['collapsed']:.0%} of {latents['latents']}"),
        *((f"gradient norm, {k}", f"{v:.3g}") for k, v in latents["gradient_norms"].items()),
    ]))  # fmt: skip
    parts.append(f"<h2>Args</h2><pre>{args}</pre>")
    head = f"<title>{title}</title><style>{STYLE}</style>"
    head = '<meta name="viewport" content="width=device-width, initial-scale=1">' + head
    return f'<!doctype html><html lang="en"><meta charset="utf-8">{head}{"".join(parts)}</html>'


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--script", help="the script of the run, if it is none of ours")
    parser.add_argument("--env-id", help="allows an id that imports a module")
    parser.add_argument("--horizon", type=int, default=50, help="steps of the longest rollouts")
    parser.add_argument("--episodes", type=int, default=10, help="fresh episodes to play")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--film", action="store_true", help="film an episode instead")
    parser.add_argument("--dream", action="store_true", help="film a dream instead")
    args = parser.parse_args(argv)
    for name in ("horizon", "episodes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, it must be at least 1")
    import matplotlib

    matplotlib.use("Agg")
    run = tools.load_run(args.run, args.script, args.env_id, not args.no_cuda)
    if args.film or args.dream:
        if args.film:
            frames, total = film_episode(run)
            name = "evaluate"
            print(f"return {total:.1f}")
        else:
            torch.manual_seed(0)
            frames, name = film_dream(run, tools.replayed(run, 1, 6), args.horizon), "dream"
        path = args.run / "videos" / f"{name}.gif"
        runtime.save_gif(path, frames)
        print(path)
        return
    log = runtime.read_log(args.run)
    numbers, fresh, windows = measure(run, args.episodes, args.horizon)
    numbers["outside"] = beside_good_runs(numbers["script"], vars(run.args), log)
    page = report(run, numbers, fresh, windows, log)
    (args.run / "report.json").write_text(json.dumps(numbers, indent=1))
    (args.run / "report.html").write_text(page)
    (args.run / "videos").mkdir(exist_ok=True)
    drawn = [cv2.imdecode(np.frombuffer(x, np.uint8), 1) for x in draw_horizons(numbers)]
    cv2.imwrite(str(args.run / "videos" / "horizons.png"), cv2.vconcat(drawn))
    print(*numbers["verdict"], *numbers["outside"], args.run / "report.html", sep="\n")


if __name__ == "__main__":
    with runtime.exit_on_error():
        main()
