"""The process of a rank other than 0: it does the calls that rank 0 sends, until the pipe ends.

python -m grengines.runtime.follower FD

FD: a socket. It reads a grengines.runtime.team.Recipe, then calls, and writes ("answer", what it was asked) or
("failed", (why, whether memory ran out)).
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection

import torch

from grengines.runtime.team import Recipe


def main() -> None:
    """Follow rank 0."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a terminal or systemd sends them to all processes
        signal.signal(number, signal.SIG_IGN)  # rank 0 may finish what is in flight, and then ends the pipe
    connection, code = Connection(int(sys.argv[1])), 0
    try:
        follow(connection)
    except (EOFError, ConnectionError):  # rank 0 has gone
        pass
    except BaseException as e:
        code = 1
        traceback.print_exc()  # to the log of the cell
        line = " ".join(str(e).split())
        connection.send(("failed", (f"failed: {type(e).__name__}: {line}", isinstance(e, torch.OutOfMemoryError))))
    os._exit(code)  # a collective that waits for rank 0 must not hold the process


@torch.inference_mode()
def follow(connection: Connection) -> None:
    """Make this rank's part, then do calls until rank 0 sends None."""
    recipe: Recipe = connection.recv()
    device = recipe.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(recipe.threads)
    group = recipe.group()
    calls = recipe.make(group, device, **recipe.arguments)
    connection.send(("answer", "ready"))
    while (message := connection.recv()) is not None:
        name, inputs, arguments = message
        if name == "memory":
            connection.send(("answer", memory_mib(device)))
            continue
        there = []
        for one in inputs:
            buffer = group.first_(torch.empty(one.buffer, dtype=torch.int64, device=device))
            there.append(replace(one, buffer=buffer).to(device))
        calls[name](there, **arguments)
    calls.get("close", lambda: None)()


def memory_mib(device: torch.device) -> float:
    """Return the most memory so far: PyTorch's on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
