"""The presets of each script are the hyperparameters that its paper and its code published."""

import pytest

import dreamerv1
import dreamerv2
import dreamerv3

SUITE = {"action_repeat": 2, "time_limit": 1000}  # DeepMind's control suite
GAMES = {
    "action_repeat": 4, "time_limit": 108_000, "sticky_prob": None, "full_action_space": False,
}  # fmt: skip
OTHER = {"action_repeat": 1, "discount_head": True, "reward_transform": "none"}

V1 = {  # what both published settings share
    "grayscale": False, "observation": "auto", "num_envs": 1, "batch_size": 50, "batch_length": 50,
    "deter": 200, "hidden": 200, "stoch": 30, "cnn_depth": 32, "units": 400, "layers": 4,
    "reward_layers": 2, "discount_layers": 3, "critic_layers": 3, "act": "elu", "cnn_act": "relu",
    "norm": "none", "free_nats": 3, "gamma": 0.99, "discount_lambda": 0.95, "actor_dist": "auto",
    "actor_grad": "dynamics", "actor_entropy": 0, "expl_noise": 0.3, "expl_epsilon": 0.4,
    "expl_min": 0.1, "expl_decay": 200_000, "prefill": 5000, "pretrain": 100, "train_every": 1000,
    "train_steps": 100, "model_lr": 6e-4, "actor_lr": 8e-5, "critic_lr": 8e-5, "adam_eps": 1e-7,
    "clip": 100, "eval_episodes": 1,
}  # fmt: skip
V1_DMC = V1 | SUITE | {
    "reward_transform": "none", "discount_head": False, "kl_scale": 1, "imag_horizon": 15,
    "eval_every": 10_000,
}  # fmt: skip
V1_ATARI = V1 | GAMES | {
    "reward_transform": "tanh", "discount_head": True, "discount_scale": 10, "kl_scale": 0.1,
    "imag_horizon": 10,
}  # fmt: skip

V2 = {
    "batch_size": 16, "batch_length": 50, "replay_size": 2_000_000, "stoch": 32, "classes": 32,
    "cnn_depth": 48, "units": 400, "layers": 4, "act": "elu", "norm": "none",
    "reward_head": "normal", "kl_balance": 0.8, "free_avg": True, "discount_lambda": 0.95,
    "imag_horizon": 15, "actor_dist": "auto", "actor_grad": "auto", "slow_update": 100,
    "adam_eps": 1e-5, "weight_decay": 1e-6, "clip": 100,
}  # fmt: skip
V2_DMC = V2 | SUITE | {
    "grayscale": False, "favor_ends": False, "deter": 200, "hidden": 200, "free_nats": 1,
    "kl_scale": 1, "discount_head": False, "reward_transform": "none", "model_lr": 3e-4,
    "actor_lr": 8e-5, "critic_lr": 8e-5, "gamma": 0.99, "actor_entropy": 1e-4, "prefill": 1000,
    "pretrain": 100, "train_every": 5,
}  # fmt: skip
V2_ATARI = V2 | GAMES | {
    "grayscale": True, "favor_ends": True, "deter": 600, "hidden": 600, "free_nats": 0,
    "kl_scale": 0.1, "discount_head": True, "discount_scale": 5, "reward_transform": "tanh",
    "model_lr": 2e-4, "actor_lr": 4e-5, "critic_lr": 1e-4, "gamma": 0.999, "actor_entropy": 1e-3,
    "prefill": 50_000, "pretrain": 1, "train_every": 16,
}  # fmt: skip

V3 = {
    "batch_size": 16, "batch_length": 64, "num_envs": 16, "layers": 3, "stoch": 32, "blocks": 8,
    "unimix": 0.01, "dyn_scale": 1, "rep_scale": 0.1, "free_nats": 1, "gamma": 1 - 1 / 333,
    "discount_lambda": 0.95, "imag_horizon": 15, "actor_dist": "auto", "actor_entropy": 3e-4,
    "return_rate": 0.01, "replay_critic": 0.3, "slow_rate": 0.02, "slow_scale": 1, "lr": 4e-5,
    "warmup": 1000, "agc": 0.3, "replay_size": 5_000_000,
}  # fmt: skip
V3_GAMES = V3 | {"size": "200m", "action_repeat": 4, "full_action_space": True}
V3_ATARI = V3_GAMES | {
    "grayscale": True, "sticky_prob": 0.25, "time_limit": 108_000, "train_ratio": 32,
    "total_frames": 204_000_000,
}  # fmt: skip
V3_ATARI100K = V3_GAMES | {
    "grayscale": False, "sticky_prob": 0, "time_limit": 100_000, "train_ratio": 256,
    "num_envs": 1, "total_frames": 440_000,
}  # fmt: skip
V3_DMC = V3 | SUITE | {"size": "12m", "train_ratio": 512, "grayscale": False}
V3_CRAFTER = V3 | {
    "size": "200m", "action_repeat": 1, "grayscale": False, "train_ratio": 512, "num_envs": 1,
    "total_frames": 1_100_000,
}  # fmt: skip
# Small tasks change sizes, the discount and the rate; losses, scales, horizon and entropy stay.
CHANGED = {"batch_size", "batch_length", "num_envs", "layers", "blocks", "gamma", "lr", "warmup"}
V3_OTHER = {k: v for k, v in V3.items() if k not in CHANGED}

TABLES = {
    dreamerv1: {"atari": V1_ATARI, "dmc_pixels": V1_DMC, "dmc_vector": V1_DMC, "other": OTHER},
    dreamerv2: {"atari": V2_ATARI, "dmc_pixels": V2_DMC, "dmc_vector": V2_DMC, "other": OTHER},
    dreamerv3: {
        "atari": V3_ATARI, "atari100k": V3_ATARI100K, "crafter": V3_CRAFTER,
        "dmc_pixels": V3_DMC | {"total_frames": 1_200_000},
        "dmc_vector": V3_DMC | {"total_frames": 600_000}, "other": V3_OTHER,
    },
}  # fmt: skip


@pytest.mark.parametrize("script", TABLES, ids=lambda script: script.__name__)
def test_presets_equal_the_published_hyperparameters(script):
    assert script.PRESETS.keys() == TABLES[script].keys()
    for name, table in TABLES[script].items():
        args = vars(script.Args(**script.PRESETS[name]))
        assert {k: args[k] for k in table} == table, name
        if script is dreamerv1 and name != "atari":  # whose replay would be too large
            assert args["replay_size"] >= args["total_frames"] // args["action_repeat"], name
