"""FLOPs: counted from the formula, on machines whose accelerator counts none, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilaff_jax.runtime import cost

M, N, K = 6, 10, 14


def product(a, b):
    return a @ b


@pytest.mark.parametrize("arrays", [True, False])
def test_a_product_is_two_operations_a_term(arrays):
    a, b = (
        jnp.ones(s) if arrays else jax.ShapeDtypeStruct(s, np.float32) for s in ((M, K), (K, N))
    )
    assert cost.flops(product, a, b) == 2 * M * N * K


def test_an_accelerator_that_counts_none_is_no_hindrance(monkeypatch):
    """JAX's GPUs answer None for a program that is not compiled; then its CPU is asked."""
    count = jax.stages.Lowered.cost_analysis
    monkeypatch.setattr(
        jax.stages.Lowered,
        "cost_analysis",
        lambda self: count(self) if jax.config.jax_default_device is not None else None,
    )
    assert jax.jit(product).lower(jnp.ones((M, K)), jnp.ones((K, N))).cost_analysis() is None
    assert cost.flops(product, jnp.ones((M, K)), jnp.ones((K, N))) == 2 * M * N * K


def test_without_a_cpu_the_compiled_program_is_counted(monkeypatch):
    def none(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", none)
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    assert cost.flops(product, jnp.ones((M, K)), jnp.ones((K, N))) == pytest.approx(
        2 * M * N * K, 0.1
    )
