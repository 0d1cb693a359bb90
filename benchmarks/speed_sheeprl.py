"""One update and one policy step of sheeprl's DreamerV1 or DreamerV2 on the shapes of speed.py.

speed.py starts it with the Python of an environment of its own, in which torch and sheeprl are
installed; it needs nothing of ours. It reads a workload as JSON from its arguments, then commands
from stdin, `update 3` or `policy 100`, and answers each with a JSON list of seconds.
"""

import importlib
import json
import resource
import sys
import time
import warnings

import gymnasium as gym
import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning import Fabric
from omegaconf import OmegaConf
from sheeprl.utils.utils import dotdict

warnings.filterwarnings("ignore")
work = json.loads(sys.argv[1])
torch.set_num_threads(work["threads"])
torch.manual_seed(1)
script, sizes = work["script"], work["sizes"]
version = script.removeprefix("dreamer")  # v1 or v2
name = f"sheeprl.algos.dreamer_{version}"
overrides = [f"exp=dreamer_{version}", "env=dummy", "metric.log_level=0"]
overrides += [f"algo.{k}={v}" for k, v in work["sheeprl"].items()]
with initialize_config_module("sheeprl.configs", version_base="1.3"):
    config = compose("config", overrides)
cfg = dotdict(OmegaConf.to_container(config, resolve=True))
torch.distributions.Distribution.set_default_validate_args(cfg.distribution.validate_args)
fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")

T, B, A = sizes["batch_length"], sizes["batch_size"], work["actions"]
spaces = {}
if "image" in work["shapes"]:
    spaces["rgb"] = gym.spaces.Box(0, 255, work["shapes"]["image"], np.uint8)
    cfg.algo.cnn_keys.encoder = cfg.algo.cnn_keys.decoder = ["rgb"]
else:
    cfg.algo.cnn_keys.encoder = cfg.algo.cnn_keys.decoder = []
if "vector" in work["shapes"]:
    spaces["state"] = gym.spaces.Box(-np.inf, np.inf, work["shapes"]["vector"], np.float32)
    cfg.algo.mlp_keys.encoder = cfg.algo.mlp_keys.decoder = ["state"]
else:
    cfg.algo.mlp_keys.encoder = cfg.algo.mlp_keys.decoder = []
continuous = not work["discrete"]
agent_module = importlib.import_module(f"{name}.agent")
train = importlib.import_module(f"{name}.dreamer_{version}").train
*modules, player = agent_module.build_agent(
    fabric,
    (A,),
    continuous,
    cfg,
    gym.spaces.Dict(spaces),
    *([None] * (4 if version == "v2" else 3)),
)
if version == "v2":
    build = importlib.import_module(f"{name}.utils").build_optimizer
else:

    def build(conf, params):
        return instantiate(conf, params=params, _convert_="all")


optimizers = fabric.setup_optimizers(
    build(cfg.algo.world_model.optimizer, modules[0].parameters()),
    build(cfg.algo.actor.optimizer, modules[1].parameters()),
    build(cfg.algo.critic.optimizer, modules[2].parameters()),
)
if continuous:
    actions = torch.rand(T, B, A) * 2 - 1
else:
    actions = torch.nn.functional.one_hot(torch.randint(A, (T, B)), A).float()
data = {"actions": actions, "rewards": torch.randn(T, B, 1)}
data |= {k: torch.zeros(T, B, 1) for k in ("terminated", "truncated", "is_first")}
if "rgb" in spaces:
    data["rgb"] = torch.randint(256, (T, B, *spaces["rgb"].shape)).float()
if "state" in spaces:
    data["state"] = torch.randn(T, B, *spaces["state"].shape)
player.num_envs = 1
with torch.no_grad():
    player.init_states()
obs = {
    k: v[:1, :1] / 255 - 0.5 if k == "rgb" else v[:1, :1] for k, v in data.items() if k in spaces
}


def update():
    batch = {k: v.clone() for k, v in data.items()}
    began = time.perf_counter()
    extra = [None, cfg] + ([(A,)] if version == "v2" else [])
    train(fabric, *modules, *optimizers, batch, *extra)
    return time.perf_counter() - began


def policy():
    began = time.perf_counter()
    with torch.inference_mode():
        player.get_actions(obs) if version == "v2" else player.get_exploration_actions(obs)
    return time.perf_counter() - began


def parameters(module):
    return sum(p.numel() for p in module.parameters())


print(json.dumps({"parameters": [parameters(m) for m in modules[:3]]}), flush=True)
for line in sys.stdin:
    what, times = line.split()
    seconds = [{"update": update, "policy": policy}[what]() for _ in range(int(times))]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak MiB": peak}), flush=True)
