"""Replay: which rows it keeps, which windows it draws, and what it leaves on the disk."""

import errno
import gc
import os
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.envs import make_envs, reset_rows

import common
import runtime

SHAPES = {
    "vector": (2,),  # number of the row and of the environment
    "action": (3,),
    "reward": (),
    "is_first": (),
    "is_terminal": (),
}
DTYPES = dict.fromkeys(SHAPES, np.float32) | {"is_first": np.bool_}
CPU = torch.device("cpu")
# Rows that are resets, and of which environments; row 24 is too early for a whole window.
ENDS = {0: (0, 1, 2), 25: (0,), 30: (1,), 41: (0,), 24: (2,), 52: (2,)}
FILES = {"lock", *(f"{name}.npy" for name in (*SHAPES, "written"))}


def make_row(number, num_envs=3, first=()):
    """A row that says which one it is; first: the environments for which it is a reset."""
    envs = np.arange(num_envs, dtype=np.float32)
    return {
        "vector": np.stack([np.full(num_envs, number, np.float32), envs], 1),
        "action": np.full((num_envs, 3), number, np.float32),
        "reward": number + envs / 8,
        "is_first": np.isin(envs, first).astype(np.float32),
        "is_terminal": np.zeros(num_envs, np.float32),
    }


def made(folder, *args):
    """A new replay."""
    folder.mkdir(exist_ok=True)
    return common.Replay(folder, *args, CPU)


def filled(folder, capacity, rows, num_envs=3, first=None):
    """A replay after so many rows; first: dict of row -> environments that it resets."""
    replay = made(folder, capacity, SHAPES, num_envs)
    add(replay, range(rows), first)
    return replay


def add(replay, numbers, first=None, lost=0):
    """Appends rows; lost: what is added to the numbers of rows that no checkpoint knows."""
    for number in numbers:
        replay.add(make_row(lost + number, replay.num_envs, (first or {}).get(number, ())))


def windows(replay, batches, batch_size, length, **options):
    """How often the window of each (first row, environment) was drawn, if all are whole."""
    torch.manual_seed(0)
    counts = Counter()
    for _ in range(batches):
        batch = replay.sample(batch_size, length, **options)
        number, env = batch["vector"].numpy().astype(int).transpose(2, 0, 1)  # (T, B)
        assert (np.diff(number, axis=0) == 1).all()  # contiguous
        assert (env == env[0]).all()  # of one environment
        np.testing.assert_array_equal(batch["reward"], number + env / 8)
        np.testing.assert_array_equal(batch["action"][..., 1], number)
        counts.update(zip(number[0].tolist(), env[0].tolist(), strict=True))
    return counts


def starts(rows, length):
    """The (first row, environment) of all windows in the rows, a range."""
    return {(row, env) for row in rows[: len(rows) - length + 1] for env in range(3)}


def check_rows(replay, rows, capacity, length=7):
    """It has these rows, a range, and draws their windows."""
    assert (replay.capacity, replay.start, replay.end) == (capacity, rows.start, rows.stop)
    if len(rows) >= length:
        assert set(windows(replay, 80, 101, length)) == starts(rows, length)


def favored(replay, length):
    """The windows that are drawn far more often than others, if ends are favored."""
    counts = windows(replay, 100, 301, length, favor_ends=True)
    assert set(counts) == starts(range(replay.start, replay.end), length)
    usual = np.median(list(counts.values()))
    return {start for start, n in counts.items() if n > 3 * usual}


# Windows
def test_a_batch_is_time_first_and_a_scalar_has_no_last_dimension(tmp_path):
    batch = filled(tmp_path, 50, 40).sample(6, 7)
    shapes = {k: tuple(v.shape) for k, v in batch.items()}
    assert shapes == {
        "vector": (7, 6, 2), "action": (7, 6, 3), "reward": (7, 6), "is_first": (7, 6),
        "is_terminal": (7, 6),
    }  # fmt: skip
    dtypes = {k: v.dtype for k, v in batch.items()}
    assert dtypes == dict.fromkeys(shapes, torch.float32) | {"is_first": torch.bool}


def test_resets_come_back_as_they_were_added(tmp_path):
    replay = filled(tmp_path, 40, 60, first=ENDS)
    batch = replay.sample(400, 7)
    number, env = batch["vector"].int().movedim(-1, 0).tolist()
    resets = {(row, i) for row, envs in ENDS.items() for i in envs}
    expected = [
        [pair in resets for pair in zip(*x, strict=True)] for x in zip(number, env, strict=True)
    ]
    assert batch["is_first"].any()
    assert batch["is_first"].tolist() == expected


@pytest.mark.parametrize("rows", [11, 39, 40, 41, 57, 80, 133])
def test_windows_are_all_the_contiguous_ones_and_never_cross_the_write_head(tmp_path, rows):
    check_rows(filled(tmp_path, 40, rows), range(max(0, rows - 40), rows), 40)


def test_a_window_may_be_as_long_as_the_replay(tmp_path):
    replay = filled(tmp_path, 13, 30, num_envs=2)
    assert set(windows(replay, 5, 11, 13)) == {(17, 0), (17, 1)}
    with pytest.raises(AssertionError):
        replay.sample(4, 14)


def test_windows_are_drawn_uniformly_whether_or_not_they_end_an_episode(tmp_path):
    counts = windows(filled(tmp_path, 40, 60, first=ENDS), 100, 211, 7)
    possible = (40 - 7 + 1) * 3
    expected = 100 * 211 / possible
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    assert len(counts) == possible
    assert abs(chi_square - possible) < 5 * np.sqrt(2 * possible)  # 5 standard deviations


def test_windows_are_independent_of_one_another_within_a_batch(tmp_path):
    draws = filled(tmp_path, 40, 100).sample(500, 7)["vector"][0].numpy()
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.15
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.15


def test_the_same_seed_of_torch_draws_the_same_windows(tmp_path):
    draws = []
    for k, seed in enumerate((4, 4, 5)):
        replay = filled(tmp_path / str(k), 40, 60)
        torch.manual_seed(seed)
        draws.append(torch.stack([replay.sample(9, 5)["vector"] for _ in range(3)]))
    assert draws[0].equal(draws[1])
    assert not draws[0].equal(draws[2])
    assert not draws[0][0].equal(draws[0][1])


# Episode ends
def test_the_window_at_the_end_of_an_episode_is_drawn_length_plus_1_times_as_often(tmp_path):
    capacity, rows, length = 40, 60, 5  # rows 20..59 are there
    replay = filled(tmp_path, capacity, rows, first=ENDS)
    counts = windows(replay, 150, 307, length, favor_ends=True)
    last = [(25 - 5, 0), (41 - 5, 0), (30 - 5, 1), (52 - 5, 2)]  # (24 - 5, 2) is overwritten
    usual = [n for start, n in counts.items() if start not in last]
    assert len(usual) == (capacity - length + 1) * 3 - len(last)
    for start in last:
        assert counts[start] / np.mean(usual) == pytest.approx(length + 1, rel=0.1)
    expected = 150 * 307 / (len(usual) + (length + 1) * len(last))
    chi_square = sum((n - expected) ** 2 / expected for n in usual)
    assert abs(chi_square - len(usual)) < 5 * np.sqrt(2 * len(usual))


def test_an_overwritten_reset_favors_nothing(tmp_path):
    replay = filled(tmp_path, 16, 40, num_envs=2, first={10: (0,), 14: (1,), 24: (0,)})
    # Of rows 24..39 the first one is a reset, whose episode is gone.
    counts = windows(replay, 60, 101, 6, favor_ends=True)
    assert len(counts) == 11 * 2
    assert max(counts.values()) < 2 * min(counts.values())


# The disk
def test_images_lie_on_the_disk_once_and_as_bytes(tmp_path):
    shapes = {"image": (3, 64, 64), **SHAPES}
    replay = made(tmp_path, 37, shapes, 2)
    image = np.random.default_rng(0).integers(256, size=(2, 3, 64, 64), dtype=np.uint8)
    replay.add({"image": image, **make_row(0, 2)})
    sizes = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    row = common.row_bytes(shapes)
    assert row == 3 * 64 * 64 + 4 * (2 + 3 + 1 + 1) + 1
    assert sizes["image"] - 37 * 2 * 3 * 64 * 64 < 256  # but for the header
    assert 0 < sum(sizes.values()) - 37 * 2 * row < 256 * len(sizes)
    batch = replay.sample(1, 1)
    assert batch["image"].dtype == torch.uint8
    np.testing.assert_array_equal(batch["image"][0, 0], image[int(batch["vector"][0, 0, 1])])


def test_the_disk_is_really_allocated_at_the_start(tmp_path):
    made(tmp_path, 4096, {"image": (1, 64, 64), **SHAPES}, 2)
    stat = (tmp_path / "image.npy").stat()
    assert stat.st_size > 4096 * 2 * 64 * 64
    assert stat.st_blocks * 512 >= stat.st_size


def test_numpy_alone_reads_the_rows(tmp_path):
    replay = filled(tmp_path, 10, 14)
    replay.state_dict()
    vector = np.load(tmp_path / "vector.npy")
    assert vector.shape == (10, 3, 2)
    assert vector[:, 2, 0].tolist() == [10, 11, 12, 13, 4, 5, 6, 7, 8, 9]
    assert (vector[..., 1] == np.arange(3)).all()


@pytest.mark.parametrize(("rows", "kept"), [(11, range(11)), (40, range(40)), (57, range(17, 57))])
def test_the_rows_of_a_run_are_read_in_their_order(tmp_path, rows, kept):
    filled(tmp_path / "replay", 40, rows)
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(SHAPES))
    replay = common.read_replay(tmp_path)
    assert replay.keys() == SHAPES.keys()
    for i, number in enumerate(kept):
        for key, value in make_row(number).items():
            np.testing.assert_array_equal(replay[key][i], value)
    assert len(replay["reward"]) == len(kept)


def test_rows_that_a_resumed_run_does_not_know_are_not_read(tmp_path):
    state = filled(tmp_path / "replay", 40, 20).state_dict()
    (tmp_path / "shapes.yaml").write_text(yaml.safe_dump(SHAPES))
    for lost in (range(20, 35), range(20, 55)):  # the latter overwrite rows 0..14
        add(resume(tmp_path / "replay", 40, state), lost, lost=1000)
        add(resume(tmp_path / "replay", 40, state), range(20, 23))
        start = max(0, lost.stop - 40)
        told = common.read_replay(tmp_path)
        expected = [make_row(number) for number in range(start, 23)]
        for key in SHAPES:
            np.testing.assert_array_equal(told[key], [row[key] for row in expected])


def test_shapes_of_rows_are_those_that_environments_give(tmp_path):
    envs = make_envs(2, "Pendulum-v1")
    shapes = envs.shapes
    row = reset_rows(envs)
    assert {k: v.shape[1:] for k, v in row.items()} == shapes
    replay = made(tmp_path, 10, shapes, 2)
    replay.add(row)
    for key, value in replay.sample(1, 1).items():
        assert value[0, 0].numpy() in row[key], key
    envs.close()


def test_files_of_another_shape_are_a_user_error(tmp_path):
    filled(tmp_path, 10, 5).state_dict()
    with pytest.raises(runtime.UserError, match=r"vector\.npy holds no \(10, 4, 2\) float32"):
        common.Replay(tmp_path, 10, SHAPES, 4, CPU)


def anonymous_memory():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_drawing_takes_no_memory_that_the_system_cannot_take_back(tmp_path):
    shapes = {"image": (3, 64, 64), **SHAPES}
    replay = made(tmp_path, 10_000, shapes, 2)
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(2, 3, 64, 64), dtype=np.uint8)
    row = {"image": image, **make_row(1, 2)}
    for _ in range(100):
        replay.add(row)
    replay.sample(16, 50)
    before = anonymous_memory()
    for _ in range(9900):
        replay.add(row)
    for _ in range(100):
        replay.sample(16, 50, favor_ends=True)
    assert anonymous_memory() - before < 50 * 2**20  # of 234 MiB


# Resume
def resume(folder, capacity, state):
    """The replay of a process that goes on after a checkpoint."""
    replay = common.Replay(folder, capacity, SHAPES, 3, CPU)
    replay.load_state_dict(state)
    return replay


def draw(replay, length):
    """The windows that a seed of torch's generator draws."""
    torch.manual_seed(8)
    return replay.sample(9, length)["vector"]


def in_another_process(function):
    """Runs it in a fork of this process -> the name and text of its error, or how it died."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            function()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writer)
    died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(reader) as file:
        return file.read() if died == 0 else str(died)


def test_a_resumed_replay_draws_what_the_undisturbed_one_would_have(tmp_path):
    replay = filled(tmp_path, 40, 57)
    state = replay.state_dict()
    undisturbed = draw(replay, 5)
    resumed = resume(tmp_path, 40, state)
    assert draw(resumed, 5).equal(undisturbed)
    check_rows(resumed, range(17, 57), 40)
    add(resumed, [57])
    check_rows(resumed, range(18, 58), 40)


def test_a_checkpoint_carries_the_state_and_the_generator_that_draws(tmp_path):
    replay = filled(tmp_path, 40, 57)
    replay.sample(9, 5)
    runtime.save_checkpoint(tmp_path, {"replay": replay}, {"step": 57})
    undisturbed = replay.sample(9, 5)["vector"]
    resumed = common.Replay(tmp_path, 40, SHAPES, 3, CPU)
    assert runtime.load_checkpoint(tmp_path, {"replay": resumed}) == {"step": 57}
    assert resumed.sample(9, 5)["vector"].equal(undisturbed)  # torch's generator is restored
    check_rows(resumed, range(17, 57), 40)


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    replay = filled(tmp_path, 100, 30)
    state = replay.state_dict()
    add(replay, range(30, 45), lost=1000)
    resumed = resume(tmp_path, 100, state)
    check_rows(resumed, range(30), 100)
    add(resumed, [30])
    check_rows(resumed, range(31), 100)


def test_rows_that_were_overwritten_after_the_checkpoint_are_not_drawn(tmp_path):
    replay = filled(tmp_path, 40, 57)  # rows 17..56
    state = replay.state_dict()
    add(replay, range(57, 70), lost=1000)  # which overwrite rows 17..29
    # A second crash before the next checkpoint, whatever the size, brings no row back.
    for capacity in (40, 40, 90, 90):
        resumed = resume(tmp_path, capacity, state)
        check_rows(resumed, range(30, 57), 40)
        add(resumed, range(57, 60), lost=2000)
    # Nor does one after a checkpoint of fewer rows than there were.
    resumed = resume(tmp_path, 40, state)
    add(resumed, [57])
    again = resume(tmp_path, 40, resumed.state_dict())
    check_rows(again, range(30, 58), 40)
    add(again, range(58, 150))
    check_rows(again, range(110, 150), 40)


def test_resets_that_were_dropped_or_overwritten_favor_nothing(tmp_path):
    replay = filled(tmp_path, 40, 57, first={35: (1,), 22: (0,)})
    state = replay.state_dict()
    add(replay, range(57, 70), first={66: (0, 1, 2)}, lost=1000)
    resumed = resume(tmp_path, 40, state)
    assert favored(resumed, 5) == {(30, 1)}
    check_rows(resumed, range(30, 57), 40)


def test_a_replay_whose_rows_were_all_overwritten_begins_anew(tmp_path):
    replay = filled(tmp_path, 20, 30)
    state = replay.state_dict()
    add(replay, range(30, 65), lost=1000)
    resumed = resume(tmp_path, 20, state)
    check_rows(resumed, range(30, 30), 20)
    add(resumed, range(30, 40))
    check_rows(resumed, range(30, 40), 20)


def test_a_state_never_knows_more_rows_than_the_disk_holds(tmp_path, monkeypatch):
    replay, flushed = filled(tmp_path, 40, 57), []
    monkeypatch.setattr(np.memmap, "flush", lambda self: flushed.append(self.filename))
    replay.state_dict()
    names = {os.path.basename(name) for name in flushed}
    assert names == {f"{name}.npy" for name in (*SHAPES, "written")}


@pytest.mark.parametrize(("written", "oldest"), [(59, 0), (60, 0), (61, 1), (95, 35)])
def test_a_crash_after_growth_takes_no_more_than_was_overwritten(tmp_path, written, oldest):
    state = filled(tmp_path, 40, 37).state_dict()
    grown = resume(tmp_path, 60, state)
    add(grown, range(37, written), lost=1000)
    for capacity in (40, 60):
        check_rows(resume(tmp_path, capacity, state), range(oldest, 37), 60, length=3)


def test_an_older_checkpoint_knows_rows_that_a_newer_one_has_lost(tmp_path):
    replay = filled(tmp_path, 40, 50)  # rows 10..49
    older = replay.state_dict()
    add(replay, range(50, 57))
    check_rows(resume(tmp_path, 40, older), range(17, 50), 40)


# Growth
def check_wrapping(replay):
    """Adds rows until the ring has come round twice; it must have the last ones all the time."""
    capacity, start = replay.capacity, replay.start
    for stop in (capacity - 1, capacity, capacity + 1, 2 * capacity - 1, 2 * capacity + 7):
        add(replay, range(replay.end, stop))
        oldest = max(start, replay.end - capacity)
        check_rows(replay, range(oldest, replay.end), capacity, length=3)


def check_disk(folder, capacity):
    """The files take the room that their rows need, all of it allocated."""
    for name, shape in SHAPES.items():
        stat = (folder / f"{name}.npy").stat()
        size = capacity * 3 * int(np.prod(shape)) * np.dtype(DTYPES[name]).itemsize
        assert size < stat.st_size < size + 256
        assert stat.st_blocks * 512 >= stat.st_size
        assert np.load(folder / f"{name}.npy", mmap_mode="r").shape == (capacity, 3, *shape)
    assert np.load(folder / "written.npy").shape == (1, 3)
    assert {path.name for path in folder.iterdir()} == FILES


@pytest.mark.parametrize("rows", [3, 5, 39, 40])
@pytest.mark.parametrize("capacity", [41, 57, 80, 100])
def test_a_longer_run_has_more_rows_and_keeps_those_from_before(tmp_path, rows, capacity):
    replay = filled(tmp_path, 40, rows)
    state = replay.state_dict()
    undisturbed = draw(replay, 3)
    grown = resume(tmp_path, capacity, state)
    assert draw(grown, 3).equal(undisturbed)
    check_rows(grown, range(rows), capacity, length=3)
    check_disk(tmp_path, capacity)
    check_wrapping(grown)
    again = resume(tmp_path, capacity, grown.state_dict())
    check_rows(again, range(capacity + 7, 2 * capacity + 7), capacity, length=3)


@pytest.mark.parametrize("rows", [41, 57, 80, 133])
@pytest.mark.parametrize("capacity", [41, 80, 1000])
def test_a_ring_that_has_come_round_keeps_its_size(tmp_path, rows, capacity):
    replay = filled(tmp_path, 40, rows)
    state = replay.state_dict()
    undisturbed = draw(replay, 3)
    resumed = resume(tmp_path, capacity, state)
    assert draw(resumed, 3).equal(undisturbed)
    check_rows(resumed, range(rows - 40, rows), 40, length=3)
    check_disk(tmp_path, 40)
    check_wrapping(resumed)


def test_a_ring_that_came_round_after_the_checkpoint_keeps_its_size(tmp_path):
    replay = filled(tmp_path, 40, 30)
    state = replay.state_dict()
    add(replay, range(30, 41), lost=1000)
    resumed = resume(tmp_path, 80, state)
    check_rows(resumed, range(1, 30), 40)
    check_wrapping(resumed)


def test_a_replay_can_grow_again_and_again(tmp_path):
    replay = filled(tmp_path, 9, 9)
    for capacity in (10, 99, 100, 101, 4096):  # one more digit moves no row
        replay = resume(tmp_path, capacity, replay.state_dict())
        check_rows(replay, range(replay.end), capacity, length=3)
        check_disk(tmp_path, capacity)
        add(replay, range(replay.end, min(capacity, 200)))
    check_rows(replay, range(200), 4096, length=3)


def test_the_ends_of_episodes_are_favored_after_growth(tmp_path):
    state = filled(tmp_path, 40, 40, first={0: (0, 1, 2), 35: (1,)}).state_dict()
    grown = resume(tmp_path, 60, state)
    assert favored(grown, 5) == {(30, 1)}
    add(grown, range(40, 70), first={64: (2,)})  # rows 10..69 are left
    assert favored(grown, 5) == {(30, 1), (59, 2)}


@pytest.mark.parametrize("rows", [20, 57])
def test_a_replay_never_shrinks(tmp_path, rows):
    state = filled(tmp_path, 40, rows).state_dict()
    check_rows(resume(tmp_path, 20, state), range(max(0, rows - 40), rows), 40)
    check_disk(tmp_path, 40)


CALLS = 2 * (len(SHAPES) + 1)  # each file is allocated and has its header written


def die_growing(folder, state, moment, survived):
    """Grows to 80 rows in a process that is killed at the call after those survived."""

    def grow():
        os.posix_fallocate = partial(dying, os.posix_fallocate)
        np.lib.format.write_array_header_1_0 = partial(dying, np.lib.format.write_array_header_1_0)
        resume(folder, 80, state)

    def dying(function, file, *args):
        calls.append(args)
        if len(calls) <= survived:
            return function(file, *args)
        if moment == "amid" and isinstance(file, int):
            function(file, 0, (os.fstat(file).st_size + args[1]) // 2)
        elif moment != "before":
            function(file, *args)
            if moment == "after" and not isinstance(file, int):
                file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    calls = []
    return in_another_process(grow)


every_moment = pytest.mark.parametrize("moment", ["before", "amid", "after"])


@pytest.mark.slow
@every_moment
@pytest.mark.parametrize("capacity", [40, 80, 100])
def test_a_kill_in_the_middle_of_growth_loses_nothing(tmp_path, moment, capacity):
    replay = filled(tmp_path / "0", 40, 30)
    state = replay.state_dict()
    undisturbed = draw(replay, 7)
    add(replay, range(30, 40), lost=1000)  # after the checkpoint
    for survived in range(CALLS + 1):
        folder = tmp_path / f"{survived + 1}"
        shutil.copytree(tmp_path / "0", folder)
        died = die_growing(folder, state, moment, survived)
        assert died == ("-9" if survived < CALLS else "")
        resumed = resume(folder, capacity, state)
        size = resumed.capacity
        assert size in ({capacity, max(80, capacity)} if died else {max(80, capacity)})
        assert {len(data) for data in resumed.data.values()} == {size}
        assert (resumed.start, resumed.end) == (0, 30)
        assert draw(resumed, 7).equal(undisturbed)
        add(resumed, range(30, 110))
        check_rows(resumed, range(110 - size, 110), size)
        again = resume(folder, capacity, resumed.state_dict())
        check_rows(again, range(110 - size, 110), size)


@pytest.mark.slow
@every_moment
def test_growth_that_is_killed_again_and_again_loses_nothing(tmp_path, moment):
    state = filled(tmp_path / "locked", 40, 40).state_dict()
    folder = shutil.copytree(tmp_path / "locked", tmp_path / "replay")
    for survived in (*range(CALLS), *reversed(range(CALLS))):
        assert die_growing(folder, state, moment, survived) == "-9"
    check_grown(folder, state)


def check_grown(folder, state):
    """A replay of 40 rows in a ring of 40 can grow to 80."""
    grown = resume(folder, 80, state)
    check_rows(grown, range(40), 80)
    check_disk(folder, 80)
    check_wrapping(grown)


@pytest.mark.parametrize("survived", range(1, len(SHAPES) + 1))  # written.npy does not grow
def test_growth_on_a_full_disk_is_a_user_error_of_one_line_and_loses_nothing(
    tmp_path, monkeypatch, survived
):
    state, allocate, calls = filled(tmp_path, 40, 40).state_dict(), os.posix_fallocate, []

    def full(file, offset, length):
        calls.append(length)
        if len(calls) > survived:
            allocate(file, offset, (os.fstat(file).st_size + length) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(runtime.UserError, match="No space left") as error:
            resume(tmp_path, 80, state)
    assert "\n" not in str(error.value)
    check_grown(tmp_path, state)


# What is missing or damaged
def test_a_checkpoint_without_its_rows_is_a_user_error(tmp_path):
    state = filled(tmp_path, 10, 3).state_dict()
    with pytest.raises(runtime.UserError, match="lacks rows"):
        resume(tmp_path, 10, state | {"end": 4})


@pytest.mark.parametrize("name", [*SHAPES, "written"])
def test_a_missing_file_is_a_user_error_and_none_takes_its_place(tmp_path, name):
    state, path = filled(tmp_path, 40, 30).state_dict(), tmp_path / f"{name}.npy"
    missing = path.read_bytes()
    path.unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(runtime.UserError, match=rf"{name}\.npy holds no .*FileNotFoundError"):
        resume(tmp_path, 80, state)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= FILES - {f"{name}.npy"}  # the others may have grown by then
    if name == "written":
        assert changed == set()
    path.write_bytes(missing)  # found again
    check_rows(resume(tmp_path, 80, state), range(30), 80)


def test_a_folder_that_is_missing_is_a_user_error(tmp_path):
    with pytest.raises(runtime.UserError, match="elsewhere, or it is missing: FileNotFoundError"):
        common.Replay(tmp_path / "elsewhere", 10, SHAPES, 3, CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:unclosed file")  # numpy's, of a zip archive that is none
@pytest.mark.parametrize("name", ["vector", "written"])
@pytest.mark.parametrize("content", [
    lambda whole: b"", lambda whole: whole[: len(whole) // 2], lambda whole: b"hello",
    lambda whole: b"PK\x03\x04" + whole, lambda whole: whole[:10] + b"'" + whole[11:],
    lambda whole: whole.replace(b"shape", b"shade"),
    lambda whole: np.lib.format.MAGIC_PREFIX + b"\x07\x00" + whole[8:],
])  # fmt: skip
def test_a_damaged_file_is_a_user_error_of_one_line(tmp_path, name, content):
    state, path = filled(tmp_path, 40, 57).state_dict(), tmp_path / f"{name}.npy"
    path.write_bytes(damaged := content(path.read_bytes()))
    with pytest.raises(runtime.UserError, match=rf"{name}\.npy holds no") as error:
        resume(tmp_path, 40, state)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == damaged
    del error
    gc.collect()


# One process
def test_another_process_in_the_same_folder_is_refused_in_one_line(tmp_path):
    replay = filled(tmp_path / "run", 10, 5)
    state = replay.state_dict()
    error = in_another_process(lambda: resume(tmp_path / "run", 10, state))
    assert error.startswith(f"UserError: another process trains in {tmp_path / 'run'}")
    assert "\n" not in error
    assert in_another_process(lambda: filled(tmp_path / "other", 10, 5)) == ""


def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    def die():
        filled(tmp_path, 10, 5).state_dict()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_another_process(die) == "-9"
    assert (tmp_path / "lock").exists()
    state = {"start": 0, "end": 5, "taken": 0}
    assert len(resume(tmp_path, 10, state)) == 5
