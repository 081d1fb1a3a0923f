"""What head, propagation and rivals cost: parameters, FLOPs, memory and measured time."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from tqdm import tqdm

from dilaff_jax import baselines, propagate, resize, resume
from dilaff_jax.ablation import cache, operators
from dilaff_jax.ablation.analysis import Study
from dilaff_jax.ablation.operators import IDENTITY, Candidate
from dilaff_jax.data import datasets
from dilaff_jax.models import segmenter
from dilaff_jax.runtime import cost


def measure(study: Study, workdir: pathlib.Path) -> dict[str, Any]:
    """Costs at the size of the report split's images, batch 1; kept in `workdir/cost.json`.

    `networks`: parameters, gflop, memory_mb of the baseline and of the network with head, both up
    to full-size classes, and what propagation adds. `milliseconds`: medians of interleaved runs;
    `propagation` is all that follows the outputs of a network with head up to classes, `resizing`
    the same without refinement; `dense_crf` and `pamr` refine probabilities of full size.
    """
    config = study.config
    after = {name: choice.chosen for name, choice in study.selected.items()}
    joint = "joint" in study.runs
    any_run = study.runs["joint" if joint else next(iter(study.runs))][0]
    size = next(iter(study.reported.values()))[0].size
    about = {
        "model": resume.as_json(any_run.config)["model"],
        "joint": joint,
        "size": list(size),
        "classes": study.source.num_classes,
        "after": {k: str(v) for k, v in after.items()},
        "repeats": config.ablate.repeats,
        "devices": [d.device_kind for d in jax.devices()],
    }
    bias = study.bias[0] if study.bias else None

    def make() -> dict[str, Any]:
        tqdm.write("measuring what head and propagation cost")
        image = study.source[0]["image"]
        full = np.asarray(resize.bilinear(image[None].astype(np.float32), size))
        return _measure(any_run.config, study.source, full, after, bias, joint)

    return cache.figures(workdir / "cost.json", about, make) | {
        "size": list(size),
        "repeats": config.ablate.repeats,
    }


def _measure(
    config: ml_collections.ConfigDict,
    source: datasets.Source,
    image: np.ndarray,
    after: Mapping[str, Candidate],
    bias: np.ndarray | None,
    joint: bool,
) -> dict[str, Any]:
    size, num_classes = image.shape[1:3], source.num_classes
    image = image.astype(source.dtype)
    plain = segmenter.config_of_run(config)
    plain.affinity = None
    models = {"baseline": segmenter.build(plain, num_classes)}
    if joint:
        models["joint"] = segmenter.build(segmenter.config_of_run(config), num_classes)
    networks, contenders = {}, {}
    for name, model in models.items():
        program = functools.partial(_classes, model, size)
        abstract = segmenter.abstract_variables(model)
        images = jax.ShapeDtypeStruct(image.shape, image.dtype)
        networks[name] = {
            "parameters": cost.parameters(abstract),
            "gflop": cost.flops(program, abstract, images) / 1e9,
            "memory_mb": cost.temporaries(program, abstract, images) / 1e6,
        }
        variables = jax.jit(functools.partial(model.init, train=False))(
            jax.random.key(0), jnp.asarray(image)
        )
        contenders[name] = _timed(program, variables, jnp.asarray(image))
        out: Any = jax.jit(functools.partial(model.apply, train=False))(variables, image)
    # After the last network, the one with head if there is one.
    steps = _after(out, models[name].offsets, size, after, bias, networks)
    contenders |= {k: _timed(f, *arguments) for k, (f, arguments) in steps.items()}
    contenders |= _rivals(out, size, source.picture(image), after)
    seconds = cost.interleaved(contenders, config.ablate.repeats, "timing")
    times = {k: 1000 * s for k, s in cost.median(seconds).items()}
    spread = {k: [1000 * min(s), 1000 * max(s)] for k, s in seconds.items()}
    return {"networks": networks, "milliseconds": times, "range": spread}


def _classes(model: segmenter.Segmenter, size: tuple[int, ...], variables: Any, x: Any) -> Any:
    """Full-size classes of the network alone; with head also its affinities, which are computed."""
    out: Any = model.apply(variables, x, train=False)
    return _labels(out["logits"], size), out["affinity_logits"]


def _labels(logits: jax.Array, size: tuple[int, ...]) -> jax.Array:
    return jnp.argmax(resize.bilinear(logits, size), axis=-1)


def _after(
    out: Mapping[str, Any],
    offsets: np.ndarray | None,
    size: tuple[int, ...],
    after: Mapping[str, Candidate],
    bias: np.ndarray | None,
    networks: dict[str, dict[str, float]],
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Programs that follow the network; adds what propagation costs to `networks`."""
    programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "resizing": (functools.partial(_labels, size=size), (out["logits"],))
    }
    if "refined" not in after or bias is None or offsets is None:
        return programs
    chosen = after["refined"]

    def program(candidate: Candidate) -> Callable[[Any, Any], jax.Array]:
        refine = operators.operator(candidate, bias)
        return lambda logits, affinity_logits: propagate.refine_logits(
            logits, affinity_logits, offsets, size, refine, finite=True
        )[0]

    arguments = out["logits"], out["affinity_logits"]
    programs["propagation"] = (program(chosen), arguments)
    options = dict(chosen.options)
    if isinstance(options.get("steps"), int):
        none, one = (cost.flops(program(_with_steps(chosen, t)), *arguments) / 1e9 for t in (0, 1))
        gflop, step = none + options["steps"] * (one - none), one - none
    else:
        gflop, step = cost.flops(program(chosen), *arguments) / 1e9, float("nan")
    resizing = cost.flops(program(IDENTITY), *arguments) / 1e9
    networks["propagation"] = {
        "parameters": 0,
        "gflop": gflop,
        "step_gflop": step if step == step else 0.0,
        "resizing_gflop": resizing,
        "memory_mb": cost.temporaries(program(chosen), *arguments) / 1e6,
    }
    return programs


def _with_steps(candidate: Candidate, steps: int) -> Candidate:
    options = tuple((k, steps if k == "steps" else v) for k, v in candidate.options)
    return Candidate(candidate.operator, options)


def _rivals(
    out: Mapping[str, Any], size: tuple[int, ...], image: np.ndarray, after: Mapping[str, Candidate]
) -> dict[str, Callable[[], Any]]:
    """DenseCRF and PAMR as selected; with their defaults where nothing was better than nothing."""
    probs = np.asarray(jax.nn.softmax(resize.bilinear(out["logits"], size)))
    runs: dict[str, Callable[[], Any]] = {}
    for name, candidate in after.items():
        rival = name.split("+")[-1]
        if "+" not in name or rival in runs:
            continue
        chosen = dict(candidate.options) if candidate.operator == rival else {}
        run = functools.partial(getattr(baselines, rival), probs, image, **chosen)
        runs[rival] = functools.partial(_finished, run)
    return runs


def _timed(program: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return functools.partial(_finished, functools.partial(jax.jit(program), *arguments))


def _finished(run: Callable[[], Any]) -> Any:
    return jax.block_until_ready(run())
