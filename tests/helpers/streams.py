"""Streams of a GPU on a CPU: work is queued, and runs later, in any order that the marks between streams allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

QUEUED = {"aten::copy_", "aten::index_copy_", "aten::index_select.out"}
MAIN, SIDE = "main", "side"


class Streams(TorchDispatchMode):
    """Queues copies, gathers and scatters of the code within. lazy: a stream that seldom runs before it has to."""

    def __init__(self, seed: int, lazy: str) -> None:
        super().__init__()
        self.random, self.lazy = Random(seed), lazy
        self.current = MAIN
        self.queues: dict[str, deque[LateMark | Callable[[], Any] | tuple[LateMark]]] = {MAIN: deque()}
        self._running = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._running or func.name() not in QUEUED:
            return func(*args, **kwargs)
        self.queues[self.current].append(lambda: func(*args, **kwargs))
        return kwargs.get("out", args[0])

    def mark(self, device: object) -> LateMark:
        """Stand for grengines.runtime.timing.Mark."""
        return LateMark(self)

    def side(self, device: object) -> LateStream:
        """Stand for grengines.cache.host.side_stream. The first is called side1."""
        name = f"{SIDE}{len(self.queues)}"
        self.queues[name] = deque()
        return LateStream(self, name)

    def run(self, steps: int) -> None:
        """Run some of what is queued."""
        seldom = self.random.random() < 0.2
        names = [name for name in self.queues if name != self.lazy or seldom]
        for _ in range(steps):
            self._step(self.random.choice(names))

    def run_until(self, done: Callable[[], bool]) -> None:
        """Run what is queued, and the lazy stream only where nothing else can run."""
        names = sorted(self.queues, key=lambda name: name == self.lazy)
        while not done():
            first = names[:-1]
            self.random.shuffle(first)
            assert any(self._step(name) for name in [*first, names[-1]]), "all streams wait"

    def _step(self, name: str) -> bool:
        """Run the next of a stream. Return whether there was something that need not wait."""
        queue = self.queues[name]
        if not queue or (isinstance(queue[0], tuple) and not queue[0][0].done):
            return False
        match queue.popleft():
            case LateMark() as mark:
                mark.done = True
            case tuple():
                pass
            case work:
                self._running = True
                work()
                self._running = False
        return True


class LateStream:
    """A stream beside the main one."""

    def __init__(self, streams: Streams, name: str) -> None:
        self._streams, self._name = streams, name

    def __call__(self) -> LateStream:
        return self

    def __enter__(self) -> None:
        self._streams.current = self._name

    def __exit__(self, *exception: object) -> None:
        self._streams.current = MAIN


class LateMark:
    """A point in the work of a stream, which is reached once that work has run."""

    def __init__(self, streams: Streams) -> None:
        self._streams, self.done = streams, False
        streams.queues[streams.current].append(self)

    def wait(self) -> None:
        self._streams.queues[self._streams.current].append((self,))

    def reached(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self._streams.run_until(lambda: self.done)
