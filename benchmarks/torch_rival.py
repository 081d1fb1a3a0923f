"""torch's side of benchmarks.accelerator, in a process of its own: it compiles beside ours.

Reads requests from standard input and answers on standard output, a line of JSON each, in their
order: {make: name, kind, size, compiled} makes something and runs it; {time: name, calls} says how
long a call of it takes.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import train_step
from dilaff_jax import affinity
from dilaff_jax.interop.torchvision_import import torchvision
from tests import oracles

OFFSETS = affinity.offsets()
Timed = Callable[[int], float]


def clocked(run: Callable[[], Any], device: str) -> Timed:
    """Seconds of a call, over n calls that are waited for once."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    return seconds


def walk(size: list[int], steps: int, compiled: bool, device: str) -> Callable[[], Any]:
    """The random walk of `tests.oracles`, as torch users write it."""
    rng = np.random.default_rng(0)
    probs, weights = (
        torch.from_numpy(rng.random((size[0], channels, *size[1:3]), dtype=np.float32)).to(device)
        for channels in (size[3], len(OFFSETS))
    )
    function = (
        compile_(oracles.torch_random_walk, device) if compiled else oracles.torch_random_walk
    )

    def run() -> torch.Tensor:
        with torch.no_grad():
            return function(probs, weights, OFFSETS, steps=steps)

    return run


def inference(size: list[int], compiled: bool, device: str) -> Callable[[], Any]:
    """Labels at the size of the image, from torchvision's DeepLabv3-R50 in bfloat16."""
    make = torchvision().models.segmentation.deeplabv3_resnet50
    model = make(weights=None, weights_backbone=None, num_classes=size[3]).to(device).eval()
    images = torch.rand(size[0], 3, *size[1:3], device=device)
    if device == "cuda":
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)

    def predict(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model(images)["out"].argmax(dim=1)

    function = compile_(predict, device) if compiled else predict

    def run() -> torch.Tensor:
        with torch.no_grad():
            return function(images)

    return run


def compile_(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """torch.compile; without its code generator on a CPU, where this only has to run."""
    return torch.compile(function, backend="inductor" if device == "cuda" else "eager")


def made(request: dict[str, Any], device: str) -> Callable[[], Any]:
    """What a request asks for."""
    compiled, size = request["compiled"], request["size"]
    match request["kind"]:
        case "walk":
            return walk(size, request["steps"], compiled, device)
        case "inference":
            return inference(size, compiled, device)
        case _:
            batch = train_step.batch_of(tuple(size[:3]), size[3])
            return train_step.torchs(compiled, device, batch)


def main() -> None:
    """Says what torch there is, then answers requests until there are none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"

    def say(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    say(torch=torch.__version__, cuda=torch.version.cuda, card=card)
    timed: dict[str, Timed] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "time" in request:
            say(seconds=timed[request["time"]](request["calls"]))
            continue
        start = time.perf_counter()
        try:
            timed[request["make"]] = clocked(made(request, device), device)
            timed[request["make"]](1)
            say(made=request["make"], seconds=time.perf_counter() - start)
        except Exception as error:  # what torch cannot make is a result too
            say(made=request["make"], error=f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    main()
