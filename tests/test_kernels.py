"""The kernels, interpreted on the CPU, against XLA; compiled for TPUs that are not there."""

import functools
import importlib.util

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import export as jax_export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dilaff_jax import affinity, propagate
from dilaff_jax.kernels import backends, bands, gpu, tpu, xla
from dilaff_jax.preflight import hlo
from dilaff_jax.runtime import chips

# Interpreted once or twice each: optimising the program would take longer than running it.
HASTY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def hastily(function, *arrays):
    return jax.jit(function).lower(*arrays).compile(compiler_options=HASTY)(*arrays)


def problem(size, dilations, symmetric=False, dtype=np.float32):
    """Random probabilities, affinity logits and offsets for maps of a size (B, H, W, C)."""
    rng = np.random.default_rng(0)
    offsets = affinity.offsets(dilations, symmetric=symmetric)
    probs = rng.dirichlet(np.ones(size[-1]), size[:-1])
    logits = 3 * rng.standard_normal((*size[:-1], len(offsets)))
    return jnp.asarray(probs, dtype), jnp.asarray(logits, dtype), as_tuples(offsets)


def as_tuples(offsets):
    return tuple(map(tuple, np.asarray(offsets).tolist()))


# The same results as XLA, which tests/test_propagate.py holds to independent oracles.


@pytest.mark.parametrize(
    ("size", "dilations", "steps", "rows", "number_of_bands"),
    [
        ((2, 13, 7, 3), (1, 2), 3, 4, 4),  # a batch, odd sizes, the last band not full
        ((1, 25, 6, 9), (2,), 5, 5, 5),  # classes beyond one group of sublanes
        ((1, 9, 5, 2), (1, 8), 1, None, 1),  # offsets longer than the map is wide
        ((1, 5, 256, 2), (3,), 4, 2, 3),  # two full groups of lanes, so that rotations wrap
    ],
)
def test_signed_is_that_of_xla(size, dilations, steps, rows, number_of_bands):
    probs, logits, offsets = problem(size, dilations)
    plan = bands.plan(probs, logits, offsets, steps, rows=rows)
    assert plan.bands == number_of_bands
    bias = jnp.linspace(-2, 1, len(offsets))
    kernel = functools.partial(tpu.signed, plan=plan, interpret=True)
    refined = hastily(kernel, probs, logits, jnp.float32(0.3), bias)
    expected = propagate.signed(
        probs, logits, np.array(offsets), steps=steps, strength=0.3, bias=bias
    )
    np.testing.assert_allclose(refined, expected, atol=1e-5)


def test_random_walk_is_that_of_xla_with_every_option_and_across_bands():
    probs, logits, offsets = problem((2, 14, 7, 4), (1, 3))
    edges = jax.nn.sigmoid(logits)
    plan = bands.plan(probs, edges, offsets, 3, rows=5)
    assert plan.bands == 3
    kernel = functools.partial(tpu.random_walk, plan=plan, interpret=True)
    walk = jax.jit(kernel).lower(probs, edges, (1.0, 0.0, 1.0, 0.0)).compile(HASTY)
    names = ("sharpness", "threshold", "self_weight", "restart")
    for options in [(1.0, 0.0, 1.0, 0.0), (3.0, 0.4, 0.5, 0.2), (0.5, 0.9, 0.0, 0.7)]:
        expected = propagate.random_walk(
            probs, edges, np.array(offsets), steps=3, **dict(zip(names, options, strict=True))
        )
        np.testing.assert_allclose(walk(probs, edges, options), expected, atol=1e-5)


def test_random_walk_without_options_keeps_pixels_without_open_edge():
    probs, logits, offsets = problem((1, 6, 5, 3), (1,), dtype=jnp.bfloat16)
    edges = jnp.where(logits > 4, 0.75, 0).astype(jnp.bfloat16)
    refined = hastily(
        lambda p, a: propagate.random_walk(
            p, a, np.array(offsets), steps=4, self_weight=0.0, backend="pallas"
        ),
        probs,
        edges,
    )
    expected = propagate.random_walk(probs, edges, np.array(offsets), steps=4, self_weight=0.0)
    assert refined.dtype == jnp.float32
    np.testing.assert_allclose(refined, expected, atol=1e-5)
    alone = ~(edges > 0).any(axis=-1)
    assert alone.any()
    np.testing.assert_array_equal(refined[alone], probs[alone].astype(jnp.float32))


def test_gradients_are_those_of_xla_in_every_array_with_symmetric_offsets():
    probs, logits, offsets = problem((1, 6, 5, 3), (1, 2), symmetric=True)
    towards = jnp.asarray(np.random.default_rng(1).standard_normal(probs.shape), jnp.float32)

    def loss(backend, probs, logits, strength, bias):
        refined = propagate.signed(
            probs, logits, np.array(offsets), steps=2, strength=strength, bias=bias, backend=backend
        )
        return jnp.vdot(refined, towards)

    def gradients(backend):
        function = jax.value_and_grad(functools.partial(loss, backend), argnums=(0, 1, 2, 3))
        return hastily(function, probs, logits, 0.3, jnp.array([0.5, -1.0]))

    found, expected = gradients("pallas"), gradients("xla")
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(theirs).max()
        assert scale > 0
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * scale)


# How maps are cut.


@hypothesis.given(
    height=st.integers(1, 600),
    width=st.integers(1, 700),
    reach=st.integers(1, 12),
    steps=st.integers(1, 6),
    vmem=st.integers(2**20, 2**27),
)
def test_bands_cover_the_map_hold_all_they_depend_on_and_fit(height, width, reach, steps, vmem):
    probs = jax.ShapeDtypeStruct((1, height, width, 21), np.float32)
    guide = jax.ShapeDtypeStruct((1, height, width, 8), np.float32)
    offsets = as_tuples(affinity.offsets((reach,)))
    plan = bands.plan(probs, guide, offsets, steps, vmem=vmem)
    hypothesis.assume(not isinstance(plan, str))
    assert plan.vmem <= vmem
    assert plan.bands * plan.window <= 2 * height
    assert (plan.bands - 1) * plan.rows < height <= plan.bands * plan.rows
    halo = steps * (reach if reach < height else 0)
    for band in range(plan.bands):
        top, bottom = band * plan.rows, min((band + 1) * plan.rows, height)
        first = int(plan.first(band))
        assert 0 <= first <= max(0, top - halo)
        assert min(height, bottom + halo) <= first + plan.window <= height


def test_the_default_case_is_read_once_on_a_v5e_and_left_to_xla_on_a_v4():
    probs, logits, offsets = (
        jax.ShapeDtypeStruct((8, 129, 129, 21), np.float32),
        jax.ShapeDtypeStruct((8, 129, 129, 32), np.float32),
        as_tuples(affinity.offsets()),
    )
    plan = bands.plan(probs, logits, offsets, 4, vmem=128 * 2**20)
    assert (plan.bands, plan.window) == (1, 129)
    assert "VMEM holds too few rows" in bands.plan(probs, logits, offsets, 4, vmem=16 * 2**20)


# On a GPU.

SPATIAL = [
    ((19, 23), (1, 2, 4, 8)),  # one tile, not full
    ((40, 70), (1, 9)),  # several tiles on both axes
    ((37,), (1, 3)),
    ((4, 3), (8,)),  # offsets longer than the map
]


@pytest.mark.parametrize(("spatial", "dilations"), SPATIAL, ids=str)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_gpus_kernel_makes_the_numbers_of_xla(spatial, dilations, steps):
    rng = np.random.default_rng(0)
    offsets = as_tuples(affinity.offsets(dilations, ndim=len(spatial)))
    probs = jnp.asarray(rng.dirichlet(np.ones(5), (2, *spatial)), jnp.float32)
    logits = jnp.asarray(rng.normal(size=(2, *spatial, len(offsets))), jnp.float32)
    bias = jnp.linspace(-2, 1, len(offsets))
    given = {"offsets": offsets, "steps": steps}
    for options in ((None, None, 1.0, None), (2.0, 0.3, 0.0, 0.2)):
        walk = functools.partial(gpu.random_walk, options=options, interpret=True, **given)
        found = hastily(walk, probs, jax.nn.sigmoid(logits))
        expected = xla.random_walk(probs, jax.nn.sigmoid(logits), options, order="joint", **given)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    signed = functools.partial(gpu.signed, strength=0.3, bias=bias, interpret=True, **given)
    found = hastily(signed, probs, logits)
    np.testing.assert_allclose(found, xla.signed(probs, logits, 0.3, bias, **given), atol=1e-5)


def test_the_gpus_kernel_reads_bfloat16_and_sums_in_float32():
    probs, logits, offsets = problem((1, 18, 40, 3), (1, 4), dtype=jnp.bfloat16)
    given = {"offsets": offsets, "steps": 3}
    bias = jnp.zeros(len(offsets))
    signed = functools.partial(gpu.signed, strength=0.3, bias=bias, interpret=True, **given)
    found = hastily(signed, probs, logits)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, xla.signed(probs, logits, 0.3, bias, **given), atol=1e-5)


@pytest.mark.parametrize("form", ["lanes", "apart"])
def test_the_forms_of_xla_make_the_same_numbers_and_gradients(form):
    probs, logits, offsets = problem((2, 9, 11, 9), (1, 8))
    given = {"offsets": offsets, "steps": 3}
    options = (2.0, 0.3, 0.5, 0.2)

    def walk(form):
        def total(p, a):
            return jnp.sum(xla.random_walk(p, a, options, order="joint", form=form, **given) ** 2)

        return jax.value_and_grad(total, (0, 1))(probs, jax.nn.sigmoid(logits))

    def signed(form):
        def total(p, a, bias):
            return jnp.sum(xla.signed(p, a, 0.3, bias, form=form, **given) ** 2)

        return jax.value_and_grad(total, (0, 1, 2))(probs, logits, jnp.zeros(len(offsets)))

    for operator in (walk, signed):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            operator(form),
            operator("plain"),
        )


# Which implementation runs where.


@pytest.fixture
def a_tpu(monkeypatch):
    monkeypatch.setattr(backends, "traced_for", lambda: "tpu")


def lowered(function, *arrays, platform="tpu"):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def refine(classes, **options):
    """A function and its arrays; the number of classes keeps traces of several tests apart."""
    probs, logits, offsets = problem((1, 6, 5, classes), (1,))
    name = "random_walk" if "order" in options else "signed"
    function = functools.partial(getattr(propagate, name), offsets=np.array(offsets), **options)
    return lambda p, a: function(p, a), probs, jax.nn.sigmoid(logits)


def test_the_kernel_is_chosen_on_tpus_only(a_tpu):
    assert "tpu_custom_call" in lowered(*refine(31))
    assert "tpu_custom_call" not in lowered(*refine(32, backend="xla"))
    for platform in ("cpu", "cuda"):
        assert "custom_call" not in lowered(*refine(31), platform=platform)


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "traced_for", lambda: "gpu")


def primitives(function, *arrays):
    return str(jax.make_jaxpr(function)(*arrays))


def test_on_a_gpu_the_kernel_is_chosen_for_large_maps_and_when_asked_for(a_gpu):
    small, large = (1, 9, 8, 41), (1, 1024, 1024, 41)
    offsets = affinity.offsets((1, 2, 4))
    for size, backend, chosen in [
        (small, "auto", False),
        (small, "pallas", True),
        (large, "auto", True),
        (large, "xla", False),
    ]:
        shapes = [jax.ShapeDtypeStruct((*size[:-1], c), np.float32) for c in (41, len(offsets))]
        text = primitives(
            lambda p, a, b=backend: propagate.signed(p, a, offsets, backend=b), *shapes
        )
        assert ("copy_gmem_to_smem" in text) == chosen, (size, backend)


@pytest.mark.parametrize(
    ("capability", "auto", "pallas", "classes"),
    [
        ("9.0", True, True, 50),
        ("", True, True, 52),
        ("10.0", False, True, 54),
        ("8.9", False, False, 56),
        ("gfx90a", False, False, 58),
    ],
)
def test_on_a_gpu_the_kernel_is_chosen_on_the_chips_it_was_measured_on(
    a_gpu, monkeypatch, capability, auto, pallas, classes
):
    monkeypatch.setattr(backends, "capability", lambda: capability)
    monkeypatch.setattr(backends, "_LARGE", 0)
    function, *arrays = refine(classes)
    assert ("copy_gmem_to_smem" in primitives(function, *arrays)) == auto
    function, *arrays = refine(classes + 1, backend="pallas")
    if pallas:
        assert "copy_gmem_to_smem" in primitives(function, *arrays)
    else:
        with pytest.raises(ValueError, match=f"of compute capability {capability}"):
            function(*arrays)


def test_on_a_gpu_what_the_kernel_does_not_take_is_refused(a_gpu):
    function, *arrays = refine(42, strength=np.ones((6, 5, 1), np.float32), backend="pallas")
    with pytest.raises(ValueError, match="an option is no scalar"):
        function(*arrays)
    offsets = affinity.offsets(tuple(range(1, 22)))
    maps = jnp.full((1, 6, 5, 2), 0.5), jnp.zeros((1, 6, 5, len(offsets)))
    with pytest.raises(ValueError, match="168 weights a pixel are more than 159 registers hold"):
        propagate.signed(*maps, offsets, backend="pallas")
    offsets = affinity.offsets((128,))
    maps = jnp.full((1, 6, 5, 2), 0.5), jnp.zeros((1, 6, 5, len(offsets)))
    with pytest.raises(ValueError, match="neighbours at distance 128 are too far for a tile"):
        propagate.signed(*maps, offsets, backend="pallas")
    offsets = affinity.offsets()
    huge = [jax.ShapeDtypeStruct((1, 8192, 8192, c), np.float32) for c in (19, len(offsets))]
    with pytest.raises(ValueError, match="are beyond indices of 32 bits"):
        jax.eval_shape(lambda *x: propagate.signed(*x, offsets, backend="pallas"), *huge)
    offsets = affinity.offsets((1,), ndim=3)
    volume = jnp.full((1, 3, 3, 3, 2), 0.5), jnp.zeros((1, 3, 3, 3, 26))
    with pytest.raises(ValueError, match="maps have 3 spatial dimensions, not one or two"):
        propagate.signed(*volume, offsets, backend="pallas")


def test_the_gpus_kernel_is_lowered_for_cuda_and_differentiated_as_xla(a_gpu):
    function, *arrays = refine(43, backend="pallas")
    if jax.__version_info__ < (0, 11):  # later ones want to know the card
        assert "mosaic_gpu" in lowered(function, *arrays, platform="cuda")
    gradient = jax.grad(lambda p, a: jnp.sum(function(p, a) ** 2), (0, 1))
    found = gradient(*arrays)
    function, *arrays = refine(43, backend="xla")
    expected = jax.grad(lambda p, a: jnp.sum(function(p, a) ** 2), (0, 1))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_where_there_is_no_tpu_pallas_is_not_even_traced():
    function, *arrays = refine(33)
    assert backends.traced_for() == "cpu"
    assert "pallas_call" not in str(jax.make_jaxpr(function)(*arrays))


def test_maps_and_options_may_be_batched(a_tpu):
    _, probs, logits = refine(34)
    offsets = affinity.offsets((1,))

    def function(p, strength):
        return propagate.signed(p, logits, offsets, strength=strength)

    assert "tpu_custom_call" in lowered(jax.vmap(function), jnp.stack([probs] * 2), jnp.ones(2))


CASES = [
    ({"steps": 0}, "no step to make"),
    ({"strength": np.ones((6, 5, 1), np.float32)}, "an option is no scalar"),
    ({"order": "coarse_to_fine"}, "order 'joint' only"),
]


@pytest.mark.parametrize(("options", "reason"), CASES)
def test_what_the_kernel_does_not_take_is_left_to_xla_or_refused(a_tpu, options, reason):
    assert "tpu_custom_call" not in lowered(*refine(35, **options))
    function, *arrays = refine(35, **options, backend="pallas")
    with pytest.raises(ValueError, match=reason):
        function(*arrays)


def test_volumes_are_left_to_xla_or_refused(a_tpu):
    offsets = affinity.offsets((1,), ndim=3)
    probs, logits = jnp.full((1, 3, 3, 3, 2), 0.5), jnp.zeros((1, 3, 3, 3, 26))
    assert "tpu_custom_call" not in lowered(
        lambda p, a: propagate.signed(p, a, offsets), probs, logits
    )
    with pytest.raises(ValueError, match="3 spatial dimensions, not two"):
        propagate.signed(probs, logits, offsets, backend="pallas")


def test_sizes_that_stay_open_are_left_to_xla(a_tpu):
    function, *arrays = refine(36)
    (batch,) = jax_export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in arrays]
    exported = jax_export.export(jax.jit(function), platforms=("tpu",))(*shapes)
    assert "tpu_custom_call" not in exported.mlir_module()


def test_a_shard_map_that_keeps_track_of_what_varies_is_left_to_xla(a_tpu):
    function, *arrays = refine(37)
    mesh, spec = Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec("x")

    def mapped(check):
        return jax.shard_map(
            function, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=check
        )

    assert "tpu_custom_call" in lowered(mapped(False), *arrays)
    assert "tpu_custom_call" not in lowered(mapped(True), *arrays)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_where_jit_divides_arrays_over_devices_it_is_left_to_xla(monkeypatch, platform):
    monkeypatch.setattr(backends, "traced_for", lambda: platform)
    monkeypatch.setattr(backends, "_LARGE", 0)
    function, *arrays = refine(39 if platform == "tpu" else 40)
    alone = Mesh(np.array(jax.devices()[:1]), ("x",)).abstract_mesh
    several = jax.sharding.AbstractMesh((1, 4), ("data", "fsdp"))
    for mesh, chosen in ((several, False), (alone, True)):
        with jax.sharding.use_abstract_mesh(mesh):
            text = primitives(lambda p, a: function(p, a), *arrays)
        kernel = "pallas_call" if platform == "tpu" else "copy_gmem_to_smem"
        assert (kernel in text) == chosen, mesh
    with (
        jax.sharding.use_abstract_mesh(several),
        pytest.raises(ValueError, match="jit divides arrays along fsdp"),
    ):
        refine(44, backend="pallas")[0](*arrays)


def test_an_unknown_backend_is_refused():
    function, *arrays = refine(38, backend="triton")
    with pytest.raises(ValueError, match="backend is 'triton'; expected 'auto', 'xla' or 'pallas'"):
        function(*arrays)


# Compiled by the TPU's own compiler.


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install -e '.[preflight]'",
)
@pytest.mark.parametrize(("chip", "name"), [("v5e", "signed"), ("v6e", "random_walk")])
def test_compiled_for_a_tpu_maps_are_read_and_written_once(chip, name):
    offsets = affinity.offsets()
    mesh = Mesh(np.array(chips.devices(f"{chip}:1x1")), ("x",))
    spec = PartitionSpec("x")
    shapes = [
        jax.ShapeDtypeStruct((1, 129, 129, c), np.float32, sharding=NamedSharding(mesh, spec))
        for c in (21, len(offsets))
    ]
    mapped = jax.shard_map(
        lambda p, a: getattr(propagate, name)(p, a, offsets, steps=4),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    compiled = jax.jit(mapped).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
    assert "tpu_custom_call" in compiled.as_text()
    memory = compiled.memory_analysis()
    once = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert hlo.Program(compiled.as_text()).traffic() <= 1.3 * once
