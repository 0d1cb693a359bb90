"""Metrics, the log of a run in its three places, videos, and what becomes of them on resume."""

import contextlib
import json
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import metrics as rows
from helpers.runs import run, the_error, the_run, values
from PIL import Image
from tensorboard.summary.writer import event_file_writer

import runtime

ARGS = {"total_frames": 40, "track": False}


# The numbers of an update
@pytest.mark.parametrize("first", [0, 3])
def test_metrics_name_the_first_update_and_its_losses_that_are_not_finite(first):
    metrics = runtime.Metrics()
    assert metrics.names == []
    assert metrics.read() == {}
    good = {k: torch.tensor(1.0) for k in ("image", "kl", "actor")}
    for updates in range(first):
        metrics.record(good, updates)
        assert metrics.read() == dict.fromkeys(good, 1.0)
    nan = torch.tensor(float("nan"))
    inf = torch.tensor(-float("inf"))
    metrics.record(good | {"kl": nan, "actor": inf}, first)
    metrics.record(dict.fromkeys(good, nan), first + 1)
    metrics.record(good, first + 2)
    for read in (metrics.read, metrics.state_dict):
        with pytest.raises(FloatingPointError, match=rf"^not finite at update {first}: kl, actor$"):
            read()


def test_metrics_tell_the_values_of_the_last_update_as_they_were_then():
    metrics = runtime.Metrics()
    kl = torch.tensor(0.5)
    metrics.record({"kl": torch.tensor(9.0), "image": torch.tensor(8.0)}, 0)
    metrics.record({"kl": kl, "image": torch.tensor(-2.0)}, 1)
    kl.fill_(7.0)  # as a CUDA graph writes its next outputs over the last ones
    assert metrics.read() == {"kl": 0.5, "image": -2.0}


def test_a_metric_may_be_a_number_and_must_be_a_scalar():
    metrics = runtime.Metrics()
    metrics.record({"loss": torch.tensor(2.0), "mine": 0.5, "count": 3}, 0)
    assert metrics.read() == {"loss": 2.0, "mine": 0.5, "count": 3.0}
    assert {type(value) for value in metrics.read().values()} == {float}
    with pytest.raises(TypeError, match=r"^metric mine has shape \(4,\), not \(\)$"):
        metrics.record({"loss": torch.tensor(2.0), "mine": torch.ones(4)}, 0)


# A row
@pytest.fixture
def logger(tmp_path, monkeypatch):
    # TensorBoard reads files of the same second by a number that counts those of the process, as
    # text: 10 comes before 9. Only a test opens so many so fast.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    logger = runtime.Logger(tmp_path, ARGS, 0)
    yield logger
    logger.close()


def events(folder):
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0}).Reload()


def points(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_a_row_of_metrics_is_a_line_that_begins_with_frames(tmp_path, logger):
    logger.log({"losses/kl": torch.tensor(0.5), "charts/episodic_return": np.float32(3)}, 8, 2)
    logger.log({"losses/kl": 0.25}, 12, 3)
    first, second = rows(tmp_path)  # already there before the logger is closed
    assert list(first) == ["frames", "updates", "seconds", "losses/kl", "charts/episodic_return"]
    assert (first["frames"], first["updates"], first["losses/kl"]) == (8, 2, 0.5)
    assert first["charts/episodic_return"] == 3
    assert (second["frames"], second["updates"], second["losses/kl"]) == (12, 3, 0.25)
    assert 0 <= first["seconds"] <= second["seconds"] < 60


def test_tensorboard_reads_the_same_numbers(tmp_path, logger):
    logger.log({"losses/kl": torch.tensor(0.5), "eval/episodic_return": 3}, 8, 2)
    logger.log({"losses/kl": 0.25}, 12, 3)
    logger.writer.flush()
    tags = events(tmp_path).Tags()
    assert set(tags["scalars"]) == {"losses/kl", "eval/episodic_return"}
    assert points(tmp_path, "losses/kl") == [(8, 0.5), (12, 0.25)]
    assert tags["tensors"] == tags["images"] == []


def test_the_progress_bar_shows_the_return_of_the_last_episode_and_nothing_else(logger):
    logger.log({"losses/kl": 1.0, "eval/episodic_return": 9.0}, 4, 1)
    assert not logger.bar.postfix
    logger.log({"charts/episodic_return": np.float32(3), "charts/episodic_length": 7}, 8, 2)
    assert logger.bar.postfix == "return=3"
    logger.log({"losses/kl": 0.5}, 12, 3)
    assert logger.bar.postfix == "return=3"
    logger.log({"charts/episodic_return": np.float32(-250.5)}, 16, 4)
    assert re.fullmatch(r"return=-25[01](\.5)?", logger.bar.postfix)


@pytest.mark.parametrize("before", [0.0, 90.0])
def test_a_row_of_losses_has_the_speed_of_the_whole_run(tmp_path, logger, monkeypatch, before):
    logger.load_state_dict({"frames": 100, "seconds": before, "bytes": 0})
    now = iter(logger.began + before + np.array([10.0, 13.0, 20.0, 30.0]))
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "time", SimpleNamespace(time=lambda: next(now)))
        logger.log({"losses/model": 1.0}, 100, 10)
        logger.log({"charts/episodic_return": 1.0}, 200, 20)
        logger.log({"losses/model": 1.0}, 300, 30)
        logger.log({"losses/model": 1.0}, 300, 60)
    assert [row["seconds"] for row in rows(tmp_path)] == [before + t for t in (10, 13, 20, 30)]
    speeds = [(r.get("charts/SPS"), r.get("time/updates_per_second")) for r in rows(tmp_path)]
    assert speeds.pop(1) == (None, None)
    wanted = [(100, 10, 10), (300, 30, 20), (300, 60, 30)]  # frames, updates, seconds
    wanted = [(frames / (before + t), updates / (before + t)) for frames, updates, t in wanted]
    assert speeds == [pytest.approx(pair) for pair in wanted]


def test_other_processes_than_the_first_log_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "RANK", 1)
    args = ARGS | {"track": True}
    logger = runtime.Logger(tmp_path, args, 0)
    logger.log({"losses/model": 1.0}, 8, 2)
    logger.gif("eval/episode", np.zeros((2, 8, 8), np.uint8), 8)
    logger.progress(8, 0)
    again = runtime.Logger(tmp_path, args, 0)
    again.load_state_dict(logger.state_dict())
    assert again.state_dict()["frames"] == 8
    for closing in (logger, again):
        closing.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("sink", ["metrics.jsonl", "TensorBoard"])
def test_a_full_disk_at_a_log_is_one_line(tmp_path, capsys, sink):
    logger = runtime.Logger(tmp_path, ARGS, 0)
    logger.writer.flush()
    if sink == "TensorBoard":
        [path] = tmp_path.glob("events.*")
        path.unlink()
        path.symlink_to("/dev/full")
    else:
        logger.file.close()
        logger.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115

    def log():
        for frames in range(100):  # TensorBoard writes in a thread of its own
            logger.log({"losses/kl": 1.0}, frames, 2)
            logger.writer.flush()

    with pytest.raises(SystemExit) as stop, runtime.exit_on_error():
        log()
    assert stop.value.code == 1
    said = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
    said = [line.strip() for line in said if "frames/s" not in line]  # without the bar
    assert [line for line in said if line] == ["error: [Errno 28] No space left on device"]
    for closing in (logger.bar, logger.file, logger.writer):
        with contextlib.suppress(OSError):
            closing.close()


def test_errors_in_the_users_threads_are_shown():
    shown = []
    hook = runtime.except_for_writers(shown.append)
    mine = threading.ExceptHookArgs((ValueError, ValueError("mine"), None, threading.Thread()))
    hook(mine)
    writer = type("_AsyncWriterThread", (threading.Thread,), {})()
    hook(threading.ExceptHookArgs((ValueError, ValueError("TensorBoard's"), None, writer)))
    assert shown == [mine]


# On resume
def resumed_log(folder, size):
    """Goes on with the log of a checkpoint at frame 8 and adds a row -> its lines."""
    again = runtime.Logger(folder, ARGS, 0)
    again.load_state_dict({"frames": 8, "seconds": 1000.0, "bytes": size})
    again.log({"losses/kl": 2.0}, 12, 3)
    again.close()
    return (folder / "metrics.jsonl").read_bytes().splitlines()


def test_a_log_comes_back_from_a_checkpoint_as_it_was(tmp_path, logger):
    logger.began -= 1000  # seconds that it took
    logger.progress(8, 0)
    logger.log({"losses/kl": 1.0}, 8, 2)
    runtime.save_checkpoint(tmp_path, {"logger": logger}, {})
    state = logger.state_dict()
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert (state["frames"], state["bytes"]) == (8, size)
    assert 1000 <= state["seconds"] < 1060
    for frames in (12, 16):
        logger.progress(frames, 0)
        logger.log({"losses/kl": 9.0}, frames, 3)
    logger.writer.flush()

    again = runtime.Logger(tmp_path, ARGS, 0)
    runtime.load_checkpoint(tmp_path, {"logger": again})
    assert again.state_dict() == state | {"seconds": pytest.approx(state["seconds"], abs=60)}
    assert (again.bar.n, again.bar.total) == (8, 40)
    for frames in (8, 12):
        again.progress(frames, 0)
        assert again.bar.n == again.frames == frames
    again.log({"losses/kl": 2.0}, 12, 3)
    again.close()
    assert values(tmp_path, "losses/kl") == [(8, 1.0), (12, 2.0)]
    assert points(tmp_path, "losses/kl") == [(8, 1.0), (12, 2.0)]
    assert 1000 <= rows(tmp_path)[1]["seconds"] < 1060


def test_a_log_of_a_checkpoint_before_the_first_row_is_empty(tmp_path, logger):
    state = logger.state_dict()
    assert (state["frames"], state["bytes"]) == (0, 0)
    logger.log({"losses/kl": 1.0}, 8, 2)
    again = runtime.Logger(tmp_path, ARGS, 0)
    again.load_state_dict(state)
    again.close()
    assert rows(tmp_path) == []


@pytest.mark.parametrize("after", [
    "", '{"frames": 9, "updates": 2}\n', '{"frames": 9, "upda', "\n\n", "{broken}\n{}\n3\n",
    '{"frames": 9, "upd{"frames": 10, "updates": 3}\n', "\xff\xfe\x00\x80",
])  # fmt: skip
def test_rows_and_rubbish_from_after_the_checkpoint_are_cut_off(tmp_path, logger, after):
    logger.log({"losses/kl": 1.0}, 8, 2)
    size = logger.file.tell()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(after.encode("latin-1"))
    resumed_log(tmp_path, size)
    assert [row["frames"] for row in rows(tmp_path)] == [8, 12]


@pytest.mark.parametrize("content", [None, b"", b'{"frames": 8}\n'])
def test_a_log_that_has_lost_rows_of_the_checkpoint_goes_on(tmp_path, logger, content):
    for frames in range(1, 9):
        logger.log({"losses/kl": 1.0}, frames, 2)
    path = tmp_path / "metrics.jsonl"
    size = logger.file.tell()
    path.unlink() if content is None else path.write_bytes(content)
    resumed_log(tmp_path, size)
    assert [row["frames"] for row in rows(tmp_path)] == ([8, 12] if content else [12])


def test_broken_bytes_from_before_the_checkpoint_stop_no_resumed_run(tmp_path, logger):
    logger.log({"losses/kl": 1.0}, 8, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\n{broken\n" + path.read_bytes())
    first, second, *whole = resumed_log(tmp_path, path.stat().st_size)
    assert (first, second) == (b"\xff\xfe", b"{broken")
    assert [json.loads(line)["frames"] for line in whole] == [8, 12]


# Weights & Biases
def test_a_resumed_run_goes_on_in_its_run_of_weights_and_biases(tmp_path, monkeypatch):
    calls = []
    init = SimpleNamespace(init=lambda **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "wandb", init)
    args = ARGS | {"track": True, "wandb_project_name": "some", "wandb_entity": None}
    for _ in range(2):
        runtime.Logger(tmp_path, args, 0).close()
    where = {"project": "some", "entity": None, "name": tmp_path.name, "id": tmp_path.name}
    assert calls == [{"config": args, "sync_tensorboard": True, "resume": "allow"} | where] * 2


def test_a_run_that_cannot_be_tracked_says_so_and_has_its_arguments(place, monkeypatch, capsys):
    def no_login(**options):
        raise RuntimeError("no login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=no_login))
    assert run("dreamerv2.py", "--env-id CartPole-v1 --track") == 2
    said = "error: --track: RuntimeError: no login ("
    assert the_error(capsys.readouterr().err).startswith(said)
    assert (the_run() / "args.yaml").exists()


# Videos
@pytest.mark.parametrize("shape", [(6, 20, 30), (6, 20, 30, 3)])
def test_a_video_is_in_the_run_folder_and_in_tensorboard(tmp_path, logger, shape):
    video = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    logger.gif("eval/episode", video, 8)
    logger.writer.flush()
    path = tmp_path / "videos" / "eval_episode_8.gif"
    with Image.open(path) as image:
        assert (image.n_frames, image.size) == (6, (30, 20))
        image.seek(4)
        if len(shape) == 3:
            np.testing.assert_array_equal(np.asarray(image.convert("L")), video[4])
        assert image.info["duration"] == 50  # milliseconds
    (shown,) = events(tmp_path).Images("eval/episode")
    assert shown.step == 8
    assert shown.encoded_image_string == path.read_bytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_tensor_is_filmed_with_the_videos_of_its_batch_side_by_side(tmp_path, channels):
    torch.manual_seed(0)
    video = torch.rand(4, 3, channels, 20, 30) * 1.4 - 0.2  # (T, B, C, H, W), beyond [0, 1] too
    runtime.save_gif(tmp_path / "videos" / "some.gif", video)
    with Image.open(tmp_path / "videos" / "some.gif") as image:
        assert (image.n_frames, image.size) == (4, (90, 20))
        image.seek(2)
        frame = np.asarray(image.convert("RGB" if channels == 3 else "L")).astype(float)
    wanted = (video[2].clamp(0, 1) * 255).numpy()  # (B, C, H, W)
    wanted = np.hstack(list(wanted.transpose(0, 2, 3, 1))).squeeze()
    if channels == 1:
        assert abs(frame - wanted).max() < 4  # Pillow may merge neighbors in its palette
    else:  # a GIF has 256 colors
        assert abs(frame - wanted).mean() < 40
        assert np.corrcoef(frame.ravel(), wanted.ravel())[0, 1] > 0.9
