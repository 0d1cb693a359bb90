"""DreamerV2 whose state holds what the newest row shows, and nothing else.

    python benchmarks/without_memory.py --env-id benchmarks.recipes:CartPoleBlind-v0

The posterior takes each row for the first of an episode, in training and in acting. The prior
still predicts it from the state before and the action, so that the agent can imagine. What it
reaches is what a task gives to a Dreamer that remembers nothing.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import dreamerv2
import runtime
from dreamerv2 import PRESETS, Args, resolve_auto

__all__ = ["PRESETS", "Args", "resolve_auto"]  # what records.py asks of a script


class Forgetful(dreamerv2.RSSM):
    """deter is the same in all states: what follows the zero state and no action."""

    def obs_step(self, prev, action, embed, is_first):
        return super().obs_step(prev, action, embed, torch.ones_like(is_first))

    def img_step(self, prev, action):
        state = super().img_step(prev, action)
        zero = {k: torch.zeros_like(prev[k]) for k in ("deter", "stoch")}
        return state | {"deter": self.gru_step(zero, torch.zeros_like(action))}

    def observe(self, embed, action, is_first):
        post, _ = super().observe(embed, action, is_first)
        keep = is_first.logical_not()[..., None].float()  # (T, B, 1)
        keep[0] = 0  # what came before the window is not known
        prev = {k: post[k].roll(1, 0) * keep for k in ("deter", "stoch")}
        return post, self.stats(self.img_out(self.gru_step(prev, action * keep)))


def main(args):
    dreamerv2.RSSM = Forgetful
    return dreamerv2.main(args)


if __name__ == "__main__":
    with runtime.exit_on_error():
        sys.exit(main(runtime.parse_args(Args, PRESETS, common.choose_preset)))
