"""Several processes of one launch calibrate together, and none waits for one that is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch
from test_calibrate import assert_close, sums
from test_cli import run

from slimdiff.errors import SlimdiffError
from slimdiff.ranks import Ranks, launched

QUICK = ["--num-prompts", "3", "--steps", "2", "--device", "cpu"]


def test_alone_without_a_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched() as here:
        assert here.is_main and here.world == 1 and here.device("cpu") == torch.device("cpu")
        here.wait()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert [Ranks(rank, 4, rank % 2).device("auto") for rank in range(4)] == [
        torch.device("cuda", local) for local in (0, 1, 0, 1)
    ]
    assert taken == [0, 1, 0, 1]
    with pytest.raises(SlimdiffError, match="2 GPUs here for more processes"):
        Ranks(2, 3, 2).device("cuda")
    with pytest.raises(SlimdiffError, match="leave out --device cuda:1"):
        Ranks(0, 2, 0).device("cuda:1")
    assert Ranks(1, 2, 1).device("cpu") == torch.device("cpu")


def launch(launcher: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *launcher, "-m", "slimdiff", "calibrate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def processes(count: int, *arguments: object, of_each: dict[int, list[object]]) -> list[subprocess.Popen[str]]:
    """As a launcher starts them, but nobody watches over them; some get arguments of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "slimdiff", "calibrate", *map(str, [*arguments, *of_each.get(rank, [])])],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_write_what_one_writes(model_folder, tmp_path, launcher):
    run("calibrate", model_folder, *QUICK, "-o", tmp_path / "one")
    done = launch(launcher, model_folder, *QUICK, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 prompts in") == 1 and done.stderr.count("model:") == 1
    assert_close(sums(tmp_path / "one"), sums(tmp_path / "two"), tolerance=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


@pytest.mark.slow
def test_nobody_waits_for_a_process_that_failed(model_folder, tmp_path):
    output = tmp_path / "s.safetensors"
    good, bad = processes(2, model_folder, *QUICK, "-o", output, of_each={1: ["--num-prompts", 9999]})
    assert "9999 prompts were asked for" in bad.communicate(timeout=60)[1]
    assert bad.returncode == 1
    message = good.communicate(timeout=60)[1]
    assert good.returncode == 1 and "another one ended early" in message and "Traceback" not in message, message
    assert [path.name for path in tmp_path.iterdir()] == ["s-1-of-2.safetensors"]
