"""What follows from a seed: the noise of a run, of a process and of a fork; and setup."""

import os
import resource
from pathlib import Path

import pytest
import torch
from torch import distributions as td

import runtime


@pytest.fixture(autouse=True)
def settings():
    """Puts back what setup sets for the whole process."""
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    checks = td.Distribution._validate_args
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    td.Distribution.set_default_validate_args(checks)


def setup(seed):
    return runtime.setup(seed, cuda=False, deterministic=False, threads=1)


@pytest.mark.parametrize("seed_all", [setup, runtime.seed_process])
def test_the_same_seed_gives_the_same_draws_and_another_one_others(seed_all):
    draws = []
    for seed in (7, 7, 2**32 + 8):
        torch.rand(3)
        seed_all(seed)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1]
    assert not set(draws[0]) & set(draws[2])


def test_setup_chooses_device_and_threads():
    torch.set_num_threads(2)
    assert setup(7) == torch.device("cpu")
    assert torch.get_num_threads() == 1
    runtime.setup(7, cuda=False, deterministic=False, threads=10**6)
    assert torch.get_num_threads() == os.cpu_count()


def test_after_setup_distributions_take_their_parameters_unchecked():
    td.Distribution.set_default_validate_args(True)
    with pytest.raises(ValueError, match="constraint"):
        td.Normal(torch.zeros(1), -torch.ones(1))
    setup(7)
    assert td.Normal(torch.zeros(1), -torch.ones(1)).scale == -1


def test_after_setup_products_of_float32_are_as_exact_as_before():
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    before = (x @ x).double()
    exact = x.double() @ x.double()
    setup(7)
    assert ((x @ x).double() - exact).abs().max() < 3 * (before - exact).abs().max()


def draws_in_a_fork(*key):
    with runtime.forked_rng(*key):
        return torch.rand(4).tolist()


def test_a_fork_leaves_the_draws_outside_unchanged():
    torch.manual_seed(7)
    undisturbed = [torch.rand(3).tolist() for _ in range(4)]
    torch.manual_seed(7)
    disturbed = [torch.rand(3).tolist()]
    draws_in_a_fork("acting", 7, 0)
    disturbed.append(torch.rand(3).tolist())
    with pytest.raises(ZeroDivisionError), runtime.forked_rng("acting", 7, 1):
        _ = torch.rand(9) / (1 // 0)
    disturbed.append(torch.rand(3).tolist())
    with runtime.forked_rng("evaluation", 7):
        torch.manual_seed(0)
    disturbed.append(torch.rand(3).tolist())
    assert disturbed == undisturbed


def test_draws_in_a_fork_follow_from_its_key_alone():
    first = draws_in_a_fork("acting", 7, 0)
    torch.rand(3)
    assert draws_in_a_fork("acting", 7, 0) == first
    others = [("acting", 7, 1), ("acting", 8, 0), ("video", 7, 0), ("acting", 70), ("acting", 7)]
    for key in others:
        assert not set(draws_in_a_fork(*key)) & set(first)


def test_a_fork_in_a_fork_leaves_the_outer_one_unchanged():
    first = draws_in_a_fork("acting", 7, 0)
    with runtime.forked_rng("acting", 7, 0):
        draws = torch.rand(2).tolist()
        draws_in_a_fork("evaluation", 7)
        draws += torch.rand(2).tolist()
    assert draws == first


def test_a_seed_follows_from_its_key_and_the_process(monkeypatch):
    """Torch's generator of a CPU looks at the lower 32 bits of a seed only."""
    keys = [("acting", 1, 2), ("acting", 12), ("acting", 1, 3), ("process", 1), ("acting",)]
    seeds = []
    draws = []
    for rank in range(50):
        monkeypatch.setattr(runtime, "RANK", rank)
        seeds += [runtime.seed_of(*key) for key in keys]
        assert [runtime.seed_of(*key) for key in keys] == seeds[-len(keys) :]
        draws += draws_in_a_fork("acting", 1, 2)
        runtime.seed_process(1)
        draws += torch.rand(4).tolist()
    assert len({seed % 2**32 for seed in seeds}) == len(seeds) == 250
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len(set(draws)) == len(draws) == 400


def test_seeds_are_the_same_on_every_machine():
    assert runtime.seed_of("acting", 1, 2) == 2013912898257820372


def test_memory_that_was_freed_is_used_again_without_page_faults():
    setup(1)
    if "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("where pages are huge, there are few faults in either case")
    faults = []
    for _ in range(20):
        torch.ones(50 * 2**20 // 4)  # 12,800 pages
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert faults[-1] - faults[10] < 1000
