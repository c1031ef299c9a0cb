"""Real processes, forked from a server that has imported everything, so that each starts quickly."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["nearkin.training.api", "timm", "torchvision.transforms.v2", "sklearn.datasets"]
)
LIMIT = 180  # seconds after which a process counts as hung


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ranks(world: int) -> list[dict[str, str]]:
    """The environment that torchrun gives each of `world` processes on one machine."""
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for rank in range(world)
    ]


def start(function, *args, env=None, log: Path | None = None):
    """Run `function(*args)` in a process of its own, its output in `log`."""
    process = CONTEXT.Process(target=_inside, args=(function, args, dict(env or {}), log))
    process.start()
    return process


def finish(*processes) -> list[int]:
    """Wait for processes and return their exit codes; a hung one is killed and gives -9."""
    for process in processes:
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _inside(function, args, env, log):
    os.environ.update(env)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    try:
        code = function(*args)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
