"""Recipes for other people's worlds, and the table that says which were tried.

The packages are not among the requirements. What needs them is skipped without them; the rest runs
the recipes on stand-ins of the same interfaces.
"""

import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import environments
import gymnasium as gym
import numpy as np
import pytest
from helpers.envs import make_env

import runtime

ROOT = Path(__file__).parent.parent
IDS = {  # module: id
    "crafter": "Crafter-v0",
    "memory_maze": "MemoryMaze-9x9-v0",
    "procgen": "procgen-coinrun-v0",
    "brax": "brax-inverted_pendulum-v0",
    "minigrid": "minigrid-Empty-5x5-v0",
    "minatar": "minatar-breakout-v1",
}


def make(env_id, seed=3):
    return make_env(f"benchmarks.recipes:{env_id}", seed)


def there(module):
    return importlib.util.find_spec(module) is not None


def actions(env, count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        discrete = isinstance(env.action_space, gym.spaces.MultiBinary)
        yield (action == action.max()).astype(np.float32) if discrete else action


@pytest.mark.parametrize(("module", "env_id"), IDS.items())
def test_a_world_without_its_package_names_the_line_that_installs_it(module, env_id):
    if there(module):
        pytest.skip(f"{module} is installed")
    with pytest.raises(runtime.UserError, match="pip install ") as error:
        make(env_id)
    assert "\n" not in str(error.value)


def test_registering_the_worlds_imports_none_of_their_packages():
    names = [*IDS, "jax"]
    code = f"import sys, benchmarks.recipes; print([m for m in {names} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


@pytest.mark.parametrize(("module", "env_id"), IDS.items())
def test_a_world_begins_alike_with_a_seed_and_otherwise_with_another(module, env_id):
    if not there(module):
        pytest.skip(f"{module} is not installed")
    begins = []
    for seed in (3, 3, 4):
        env = make(env_id, seed)
        rows = []
        for _ in range(2):  # episodes
            rows.append(env.reset()[0])
            rows += [env.step(action)[0] for action in actions(env, 3)]
        begins.append(rows)
        for row in rows:
            assert row.keys() == env.observation_space.spaces.keys()
            for key, space in env.observation_space.items():
                assert row[key].shape == space.shape
                assert row[key].dtype == space.dtype
    same, again, other = begins
    for a, b in zip(same, again, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    if "minigrid" not in env_id and "minatar" not in env_id:  # those always begin alike
        assert any(not np.array_equal(same[0][k], other[0][k]) for k in same[0])


# Stand-ins


@pytest.fixture
def module(monkeypatch):
    def install(name, **contents):
        found = types.ModuleType(name)
        vars(found).update(contents)
        monkeypatch.setitem(sys.modules, name, found)

    return install


def image(value):
    return np.full((64, 64, 3), value, np.uint8)


def test_crafter_tells_a_death_from_the_end_of_its_time(module):
    class Env:
        def __init__(self, reward, seed):
            self.seed = seed

        def reset(self):
            return image(self.seed % 256)

        def step(self, action):
            info = {"discount": 0.0 if action == 1 else 1.0}
            return image(action), 0.5, action in (1, 2), info

    module("crafter", Env=Env)
    env = make("Crafter-v0")
    ends = []
    for action in range(3):
        env.reset()
        row, reward, *end, _ = env.step(np.eye(17, dtype=np.float32)[action])
        assert row["image"].max() == action
        assert reward == 0.5
        ends.append(tuple(map(bool, end)))
    assert ends == [(False, False), (True, False), (False, True)]


def test_memory_maze_shows_image_and_color_and_ends_by_time_alone(module):
    class Step:
        reward, discount = 1.0, 1.0

        def __init__(self, count):
            self.count = count
            self.observation = {"image": image(count), "target_color": np.ones(3), "more": 0}

        def last(self):
            return self.count == 3

    class Maze:
        def __init__(self, seed):
            self.seed = seed

        def reset(self):
            self.count = 0
            return Step(0)

        def step(self, action):
            self.count += 1
            return Step(self.count)

    module("memory_maze.tasks", memory_maze_9x9=Maze)
    env = make("MemoryMaze-9x9-v0")
    row, _ = env.reset()
    assert {k: v.shape for k, v in row.items()} == {"image": (3, 64, 64), "vector": (3,)}
    ends = [env.step(np.eye(6)[0])[2:4] for _ in range(3)]
    assert ends == [(False, False)] * 2 + [(False, True)]


def test_procgen_keeps_the_last_image_where_the_next_level_is_shown_already(module):
    class Env:
        def __init__(self, num, env_name, num_levels, rand_seed):
            assert (num, env_name, num_levels) == (1, "coinrun", 0)
            self.count = 0
            self.reward = 0.0

        def observe(self):
            first = self.count % 3 == 0
            return np.array([self.reward]), {"rgb": image(self.count)[None]}, np.array([first])

        def act(self, action):
            self.count += 1
            self.reward = float(self.count)

    module("procgen", ProcgenGym3Env=Env)
    env = make("procgen-coinrun-v0")
    assert env.reset()[0]["image"].max() == 0
    seen = [env.step(np.eye(15)[0]) for _ in range(3)]
    assert [step[0]["image"].max() for step in seen] == [1, 2, 2]
    assert [step[1] for step in seen] == [1, 2, 3]
    assert [step[2] for step in seen] == [False, False, True]


def test_brax_compiles_once_for_all_of_its_instances(module):
    compiled = []

    def jit(function):
        compiled.append(function)
        return function

    class Pendulum:
        observation_size, action_size = 4, 1

        def reset(self, key):
            return types.SimpleNamespace(obs=np.full(4, key % 7), reward=0.0, done=0.0)

        def step(self, state, action):
            reward = float(action[0])
            return types.SimpleNamespace(obs=state.obs + 1, reward=reward, done=float(reward > 0))

    random = types.SimpleNamespace(PRNGKey=lambda seed: seed)
    module("jax", jit=jit, random=random)
    module("brax", envs=None)
    module("brax.envs", get_environment=lambda name, backend: Pendulum())
    from benchmarks import recipes

    recipes.brax_functions.cache_clear()
    one, two = make("brax-ant-v0"), make("brax-ant-v0")
    recipes.brax_functions.cache_clear()
    assert len(compiled) == 2  # reset and step
    for env in (one, two):
        before = env.reset()[0]["vector"]
        row, reward, terminated, truncated, _ = env.step(np.array([-0.5], np.float32))
        np.testing.assert_array_equal(row["vector"], before + 1)
        assert (reward, terminated, truncated) == (-0.5, False, False)
        assert env.step(np.array([0.5], np.float32))[2]


# The table


RECORD = json.loads((ROOT / "benchmarks" / "environments.json").read_text())


@pytest.mark.parametrize(("name", "scale"), [("Times1000", 1000), ("By1000", 0.001)])
def test_a_scaled_cartpole_is_cartpole_but_for_its_rewards(name, scale):
    env = make(f"CartPole{name}-v0")
    plain = make_env("CartPole-v1", 3)
    assert (env.reset()[0]["vector"] == plain.reset()[0]["vector"]).all()
    for action in actions(env, 5):
        obs, reward, *ends = env.step(action)[:4]
        plain_obs, plain_reward, *plain_ends = plain.step(action)[:4]
        assert (obs["vector"] == plain_obs["vector"]).all()
        assert reward == pytest.approx(scale * plain_reward)
        assert ends == plain_ends
    assert env.spec.max_episode_steps == plain.spec.max_episode_steps == 500


def test_the_table_of_environments_is_that_of_the_record():
    text = (ROOT / "docs" / "environments.md").read_text()
    begin, end = "<!-- environments:begin -->\n", "<!-- environments:end -->"
    assert text.split(begin)[1].split(end)[0] == environments.table(RECORD)


def test_each_world_of_the_table_was_tried_with_updates():
    assert RECORD["worlds"].keys() == environments.WORLDS.keys()
    for row in RECORD["worlds"].values():
        assert row["frames"] >= 2000
        assert row["updates"] > 10
        assert all(row["frames_per_second"].values())


def test_a_world_that_is_unknown_is_refused_in_one_line():
    with pytest.raises(SystemExit, match="no world Doom, there are Atari, "):
        environments.main(["Doom"])


@pytest.mark.slow
def test_a_world_is_tried_with_updates_and_its_row_is_kept(tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"worlds": {"Atari": RECORD["worlds"]["Atari"]}}))
    name = "Classic control"
    assert environments.main([name, "--seconds", "0.2", "--json", str(path)]) == 0
    kept = json.loads(path.read_text())["worlds"]
    assert [*kept] == ["Atari", name]
    assert kept["Atari"] == RECORD["worlds"]["Atari"]
    assert kept[name]["frames"] == 2000
    assert kept[name]["updates"] > 100
    assert kept[name]["episodes"] > 10
    assert set(kept[name]["frames_per_second"]) == {"one", "eight", "processes"}
    assert "CartPole-v1" in capsys.readouterr().out
