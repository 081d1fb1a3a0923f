"""The process in which torch runs beside benchmarks.accelerator, and how to talk to it."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

# torch.compile of a whole network takes minutes on a slow machine.
PATIENCE_SECONDS = 400


class Rival:
    """torch in a second process: makes what it is told to while we compile, and waits else.

    Args:
        left_out: told the name of what it could not make, and why.
    """

    def __init__(self, left_out: Callable[[str, str], None]) -> None:
        self._left_out = left_out
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._asked: list[str] = []

    def __enter__(self) -> "Rival":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.torch_rival"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def hello(self) -> dict[str, Any]:
        """Versions and card, as torch has them."""
        return self._answer()

    def prepare(self, kind: str, size: list[int], **options: Any) -> None:
        """Lets it make, run and compile these, eager and compiled; does not wait."""
        for name, compiled in (("torch eager", False), ("torch.compile", True)):
            self._say(make=name, kind=kind, size=size, compiled=compiled, **options)
            self._asked.append(name)

    def timed(self) -> dict[str, Callable[[int], float]]:
        """Waits for what was asked for; {name: seconds of a call, over n calls}."""
        ready = {}
        for name in self._asked:
            answer = self._answer()
            if "error" in answer:
                self._left_out(name, answer["error"])
            else:
                ready[name] = self._clock(name)
        self._asked = []
        return ready

    def _clock(self, name: str) -> Callable[[int], float]:
        def seconds(calls: int) -> float:
            self._say(time=name, calls=calls)
            return self._answer()["seconds"]

        return seconds

    def _say(self, **request: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise RuntimeError(f"torch did not answer for {PATIENCE_SECONDS} s") from None
        if answer is None:
            raise RuntimeError(f"the process of torch ended with {self._process.wait()}, see above")
        return answer

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # Libraries print there as well.
            if line.startswith("{"):
                self._answers.put(json.loads(line))
        self._answers.put(None)
