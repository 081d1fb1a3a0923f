"""Compares our networks with torch's, stage by stage, and the method with plain torch.

    python -m dilaff_jax.interop.parity --model deeplabv3_resnet50 --size 65x65 129x193 224x224

Random weights and BatchNorm statistics go into torch's model, through `torch_layout` into ours, and
the same images through both: every convolution, normalisation, block and branch, the logits at the
images' size, the loss, and the gradient of every parameter, once with BatchNorm's running
statistics ("eval") and once with the batch's ("train", dropout off; there also the statistics
after the step). torch computes all of it in float64, too, and ours is judged by its distance from
that: a gradient that is nearly nothing is mostly rounding on both sides, of which ours may have
four times torch's. Then affinity targets, propagation and losses against `torch_reference`. Prints
max |Δ| and that relative to max |torch|; exits with 1 if anything is beyond its bound.

`segformer_b0`, `convnext_tiny`, `dinov2_vits14`, `dinov3_vits16` etc. are held against Hugging
Face's (the extra `huggingface`).
"""

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import torch

from dilaff_jax import losses, resize
from dilaff_jax.errors import UserError
from dilaff_jax.interop import (
    parity_method,
    torch_layout,
    torch_models,
    torch_reference,
    transformers_models,
)
from dilaff_jax.interop.report import FORWARD_BOUND, GRADIENT_BOUND, Row, compare, print_rows

AUX_WEIGHT = 0.4
SIZES = ((65, 65), (129, 193), (224, 224))


class Result(NamedTuple):
    """What one forward and backward pass gives, named as in torch."""

    stages: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    loss: np.ndarray
    gradients: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


def network_rows(name: str, size: tuple[int, int], batch: int, seed: int) -> list[Row]:
    """Compares one network at one image size, in both modes of BatchNorm."""
    ours, theirs = torch_models.pair(name, seed)
    named = _namer(name)
    rng = np.random.default_rng(seed)
    images = _images(rng, batch, size)
    labels = _labels(rng, name, batch, size)
    mean, std = (np.asarray(v, np.float32) for v in (ours.encoder.mean, ours.encoder.std))
    pixels = torch.from_numpy((images - mean) / std).permute(0, 3, 1, 2).contiguous()
    torch_models.randomise(theirs, pixels)
    state = {named(k): v.numpy().copy() for k, v in theirs.state_dict().items()}
    template = jax.eval_shape(
        lambda: ours.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
    )
    template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
    variables = torch_layout.from_torch(ours, template, state)
    rows = [_parameter_row(name, variables, theirs), _round_trip_row(ours, variables, state)]
    for mode in ("eval", "train"):
        exact, reference = (
            _renamed(_run_torch(model, inputs, labels, mode), named)
            for model, inputs in (
                (copy.deepcopy(theirs).double(), pixels.double()),
                (theirs, pixels),
            )
        )
        with jax.default_matmul_precision("float32"):
            result = _run_jax(ours, variables, images, labels, mode)
        _check_complete(theirs, result, reference, named)
        rows += _result_rows(mode, result, reference, exact, _blocks(ours, variables))
    return rows


def _namer(name: str) -> Callable[[str], str]:
    """From names of modules in torch's memory to those in files."""
    return transformers_models.file_name if name in transformers_models.MODELS else str


def _renamed(result: Result, named: Callable[[str], str]) -> Result:
    """The same with names of files."""
    return result._replace(
        stages={named(k): v for k, v in result.stages.items()},
        gradients={named(k): v for k, v in result.gradients.items()},
        statistics={named(k): v for k, v in result.statistics.items()},
    )


def _check_complete(
    model: torch.nn.Module, ours: Result, theirs: Result, named: Callable[[str], str]
) -> None:
    """Raises UserError where a layer or gradient of torch's would go without comparison."""
    kinds = (torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.Linear, torch.nn.LayerNorm)
    layers = {named(name) for name, module in model.named_modules() if isinstance(module, kinds)}
    left = sorted((layers - set(ours.stages)) | (set(theirs.gradients) ^ set(ours.gradients)))
    if left:
        raise UserError(f"these exist on one side only: {left}")


def _result_rows(
    mode: str, ours: Result, theirs: Result, exact: Result, blocks: dict[str, str]
) -> list[Row]:
    triples = [
        ("stage", ours.stages, theirs.stages, exact.stages),
        ("output", ours.outputs, theirs.outputs, exact.outputs),
        ("loss", {"loss": ours.loss}, {"loss": theirs.loss}, {"loss": exact.loss}),
        ("statistics", ours.statistics, theirs.statistics, exact.statistics),
    ]
    rows = [
        compare(
            f"{mode} {kind}",
            name,
            _like(left[name], right[name]),
            right[name],
            FORWARD_BOUND,
            exact=best[name],
        )
        for kind, left, right, best in triples
        for name in right
        if name in left
    ]
    scales: dict[str, float] = {}
    for name, value in theirs.gradients.items():
        scales[blocks[name]] = max(scales.get(blocks[name], 0.0), float(np.abs(value).max()))
    kind = f"{mode} gradient"
    return rows + [
        compare(kind, n, ours.gradients[n], g, GRADIENT_BOUND, scales[blocks[n]], best)
        for (n, g), best in zip(theirs.gradients.items(), exact.gradients.values(), strict=True)
    ]


def _like(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Ours, `[B, H, W, C]`, as a row of tokens `[B, N, C]` where torch's is one."""
    if ours.ndim == 4 and theirs.ndim == 3:
        return ours.reshape(ours.shape[0], -1, ours.shape[-1])
    return ours


def _blocks(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, str]:
    """The block of each parameter, by torch name; gradients are relative to their block's largest.

    A scale or bias between two BatchNorms that use the batch has gradient 0 but for what ReLU cuts
    off. Beside its block it is seen to be nothing; beside itself it would be all rounding.
    """
    names = torch_layout.keys(model, {"params": variables["params"]})
    return {name: "/".join(path[1:3]) for path, name in names.items()}


def _images(rng: np.random.Generator, batch: int, size: tuple[int, int]) -> np.ndarray:
    """Smooth random colours and noise; like photos, images differ in mean and contrast, too.

    (An ASPP's pooled branch normalises over one mean an image: were they close together, what is
    compared there would be the rounding of their differences.)
    """
    contrast = np.linspace(10, 120, batch, dtype=np.float32)[:, None, None, None]
    mean = rng.uniform(30, 225, (batch, 1, 1, 3)).astype(np.float32)
    coarse = mean + contrast * rng.uniform(-1, 1, (batch, 4, 4, 3)).astype(np.float32)
    smooth = np.asarray(resize.bilinear(jnp.asarray(coarse), size))
    noise = 0.3 * contrast * rng.normal(size=smooth.shape)
    return (smooth + noise).clip(0, 255).astype(np.uint8)


def _labels(rng: np.random.Generator, name: str, batch: int, size: tuple[int, int]) -> np.ndarray:
    if name in torch_models.ENCODERS:
        return rng.integers(0, 1000, (batch,))
    labels = rng.integers(0, torch_models.NUM_CLASSES, (batch, *size))
    return np.where(rng.random(labels.shape) < 0.1, 255, labels)


def _parameter_row(name: str, variables: Mapping[str, Any], theirs: torch.nn.Module) -> Row:
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    expected = torch_models.PARAMETERS.get(name, sum(p.numel() for p in theirs.parameters()))
    return compare("parameters", f"{count:,}", count, expected, 0)


def _round_trip_row(
    model: nn.Module, variables: Mapping[str, Any], state: Mapping[str, np.ndarray]
) -> Row:
    back = torch_layout.to_torch(model, variables)
    wrong = [k for k in state if k not in back or state[k].tobytes() != back[k].tobytes()]
    wrong += [k for k in back if k not in state]
    return Row("round trip", "torch → flax → torch, tensors that differ", len(wrong), 0, 0)


def _run_torch(
    model: torch.nn.Module,
    pixels: torch.Tensor,
    labels: np.ndarray,
    mode: str,
) -> Result:
    stages: dict[str, np.ndarray] = {}

    def record(name: str) -> Any:
        def hook(module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):  # copied before a later layer works in place
                value = output.detach().numpy().copy()
                stages[name] = value if _ends_with_channels(module) else _channels_last(value)

        return hook

    hooks = [m.register_forward_hook(record(n)) for n, m in model.named_modules() if n]
    before = {k: v.numpy().copy() for k, v in model.named_buffers()}
    model.train(mode == "train")
    model.zero_grad()
    out = model(pixels)
    outputs = dict(out) if isinstance(out, Mapping) else {"out": out}
    targets = torch.from_numpy(labels)
    loss = torch_reference.cross_entropy(outputs["out"], targets)
    if "aux" in outputs:
        loss = loss + AUX_WEIGHT * torch_reference.cross_entropy(outputs["aux"], targets)
    loss.backward()
    for hook in hooks:
        hook.remove()
    statistics = _flax_statistics(before, model, stages) if mode == "train" else {}
    return Result(
        stages,
        {k: _channels_last(v.detach().numpy()) for k, v in outputs.items()},
        loss.detach().numpy(),
        {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None},
        statistics,
    )


def _flax_statistics(
    before: Mapping[str, np.ndarray],
    model: torch.nn.Module,
    stages: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The running statistics after the step, as Flax keeps them.

    torch adds 0.1·(unbiased variance), n/(n-1) times what Flax adds.
    """
    after = {k: v.numpy().copy() for k, v in model.named_buffers() if "running" in k}
    for name in [k for k in after if k.endswith("running_var")]:
        values = stages[name.removesuffix(".running_var")]
        n = values.size / values.shape[-1]
        added = after[name] - 0.9 * before[name]
        after[name] = 0.9 * before[name] + added * (n - 1) / n
    return after


def _run_jax(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    mode: str,
) -> Result:
    @jax.jit
    def run(params: Any, statistics: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss_of(params: Any) -> Any:
            out, state = model.apply(
                {"params": params, "batch_stats": statistics},
                images,
                train=mode == "train",
                capture_intermediates=True,
                mutable=["intermediates", "batch_stats"],
            )
            outputs = _outputs(out, images.shape[1:3])
            loss = _mean_cross_entropy(outputs["out"], labels)
            if "aux" in outputs:
                loss += AUX_WEIGHT * _mean_cross_entropy(outputs["aux"], labels)
            return loss, (outputs, state)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    (loss, (outputs, state)), gradients = run(
        variables["params"], variables["batch_stats"], images, labels
    )
    after = {"batch_stats": state["batch_stats"]} if mode == "train" else {}
    return Result(
        module_outputs(model, state["intermediates"]),
        {k: np.asarray(v) for k, v in outputs.items()},
        np.asarray(loss),
        torch_layout.to_torch(model, {"params": gradients}),
        torch_layout.to_torch(model, after),
    )


def _mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return losses.finish(losses.cross_entropy(logits, labels))


def _outputs(out: Any, size: Sequence[int]) -> dict[str, jax.Array]:
    if not isinstance(out, Mapping):
        return {"out": out}
    return {
        torch_name: resize.bilinear(out[name], size)
        for name, torch_name in (("logits", "out"), ("aux_logits", "aux"))
        if out[name] is not None
    }


def module_outputs(model: nn.Module, intermediates: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every module's output under its torch name.

    A ConvNorm as a whole has no module in torch that it equals (the activation stands apart), so
    its convolution and its norm are compared instead. Of a module that is called several times, the
    last output.
    """
    flat = flax.traverse_util.flatten_dict(dict(intermediates))
    paths = {path[:-1]: values[-1] for path, values in flat.items() if path[-1] == "__call__"}
    outputs = {}
    for path, value in paths.items():
        if len(path) == 0 or (*path, "conv") in paths or not isinstance(value, jax.Array):
            continue
        name = torch_layout.key(model, "/".join(path))
        if path[-1] != "conv":
            # torchvision's inverted residual adds its shortcut around a Sequential named conv.
            name = name.removesuffix(".conv")
        outputs[name] = np.asarray(value)
    return outputs


def _ends_with_channels(module: torch.nn.Module) -> bool:
    """Whether a layer of torch's has channels last, as ours."""
    kinds = (torch.nn.Linear, torch.nn.LayerNorm)
    return isinstance(module, kinds) and getattr(module, "data_format", "") != "channels_first"


def _channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = (*torch_models.SEGMENTERS, *torch_models.ENCODERS, *transformers_models.MODELS)
    parser.add_argument("--model", nargs="+", default=["deeplabv3_resnet50"], choices=names)
    parser.add_argument("--size", nargs="+", type=_size, default=SIZES, metavar="HxW")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="print every layer")
    options = parser.parse_args(arguments)
    rows = parity_method.rows(options.seed)
    print("affinity, propagation and losses", flush=True)
    print_rows(rows, everything=True)
    for name in options.model:
        for size in options.size:
            print(f"{name} at {size[0]}x{size[1]}, batch {options.batch}", flush=True)
            of_network = network_rows(name, size, options.batch, options.seed)
            print_rows(of_network, options.all)
            rows += of_network
            jax.clear_caches()  # compiled networks, of which every one is used once
    failed = sum(not r.passed for r in rows)
    print(f"{len(rows)} comparisons, {failed} beyond their bound")
    return 1 if failed else 0


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width)


if __name__ == "__main__":
    sys.exit(main())
