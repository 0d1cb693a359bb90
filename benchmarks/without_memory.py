"""DreamerV2 that takes each row for the first of an episode, in training and in acting.

    python benchmarks/without_memory.py --env-id benchmarks.recipes:CartPoleBlind-v0

What it reaches is what a task gives to an agent that remembers nothing.
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
    def obs_step(self, prev, action, embed, is_first):
        return super().obs_step(prev, action, embed, torch.ones_like(is_first))


def main(args):
    dreamerv2.RSSM = Forgetful
    return dreamerv2.main(args)


if __name__ == "__main__":
    with runtime.exit_on_error():
        sys.exit(main(runtime.parse_args(Args, PRESETS, common.choose_preset)))
