"""Offsets, shifts and ground-truth affinities."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.measure
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dilaff_jax import affinity
from tests import oracles

# Few sets and shapes: each new pair of them is compiled anew.
DILATIONS = st.sampled_from([(2, 1), (1, 9)])


def label_maps(ndim=2, max_side=9):
    half = max_side // 2
    cubes = [(1, 1, 1), (half, max_side, 1), (max_side, half, max_side)]
    shapes = st.sampled_from([cube[:ndim] for cube in cubes])
    return shapes.flatmap(
        lambda shape: hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, 255]))
    )


def test_default_offsets_are_dilation_major_then_row_major():
    found = affinity.offsets()
    assert found.shape == (32, 2)
    assert found[:8].tolist() == [
        [-1, -1], [-1, 0], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 0], [1, 1],
    ]  # fmt: skip
    for d, block in zip((1, 2, 4, 8), found.reshape(4, 8, 2), strict=True):
        assert (block == d * found[:8]).all()


@pytest.mark.parametrize(("ndim", "neighbours"), [(1, 2), (2, 8), (3, 26)])
def test_a_dilation_has_all_neighbours_of_the_cube(ndim, neighbours):
    found = affinity.offsets((3,), ndim)
    assert found.shape == (neighbours, ndim)
    assert len({tuple(o) for o in found.tolist()}) == neighbours
    assert set(np.unique(found)) <= {-3, 0, 3}


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_symmetric_offsets_are_one_of_each_opposite_pair(ndim):
    half = {tuple(o) for o in affinity.offsets((1, 2), ndim, symmetric=True).tolist()}
    full = {tuple(o) for o in affinity.offsets((1, 2), ndim).tolist()}
    assert half | {tuple(-x for x in o) for o in half} == full
    assert len(half) * 2 == len(full)


# Voxels that are longer along an axis.


def test_a_step_is_as_far_along_every_axis_and_never_nothing():
    """By a loop: an EM stack of 40 × 4 × 4 nm."""
    found = affinity.offsets((1, 2, 8, 20), 3, spacing=(40, 4, 4)).reshape(4, 26, 3)
    for d, along, block in zip((1, 2, 8, 20), (1, 1, 1, 2), found, strict=True):
        steps = [u for u in itertools.product((-1, 0, 1), repeat=3) if any(u)]
        assert block.tolist() == [[along * z, d * y, d * x] for z, y, x in steps]
    same = affinity.offsets((1, 2), 3, spacing=(0.7, 0.7, 0.7))
    np.testing.assert_array_equal(same, affinity.offsets((1, 2), 3))


def test_neighbourhoods_of_long_voxels_keep_their_dilations():
    offsets = affinity.offsets((2, 8), 3, spacing=(1, 1, 5))
    assert affinity.distinct_dilations(offsets) == [2, 8]
    assert affinity.dilation_of(offsets).tolist() == [2] * 26 + [8] * 26
    # In another order they are single offsets again, of the largest entry.
    assert affinity.dilation_of(offsets[::-1])[0] == 8
    assert affinity.dilation_of(offsets[12:14]).tolist() == [1, 1]


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, -2), (1, 1, float("nan"))])
def test_a_spacing_that_cannot_be_is_refused(spacing):
    with pytest.raises(ValueError, match="give the size of a voxel along each of 3 axes"):
        affinity.offsets((1, 2), 3, spacing=spacing)


@hypothesis.given(data=st.data())
def test_mirroring_keeps_equal_offsets_of_two_dilations_apart(data):
    """(1, 0, 0) stands in both; the maps of each dilation are mirrored from its own."""
    offsets = affinity.offsets((1, 2), 3, spacing=(9, 1, 1))
    half = affinity.offsets((1, 2), 3, symmetric=True, spacing=(9, 1, 1))
    assert len({tuple(o) for o in offsets.tolist()}) == 52 - 2
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    maps = np.random.default_rng(0).random((*shape, 26)).astype(np.float32)
    found = np.asarray(affinity.mirror(maps, offsets))
    for block in range(2):
        own = offsets[26 * block : 26 * (block + 1)]
        own_half = half[13 * block : 13 * (block + 1)]
        expected = affinity.mirror(maps[..., 13 * block : 13 * (block + 1)], own)
        np.testing.assert_array_equal(found[..., 26 * block : 26 * (block + 1)], expected)
        at = [own.tolist().index(o) for o in own_half.tolist()]
        np.testing.assert_array_equal(
            found[..., 26 * block + np.array(at)], maps[..., 13 * block : 13 * (block + 1)]
        )


def test_the_second_of_equal_offsets_stands_where_the_second_does():
    offsets = np.array([[1, 0], [0, 1], [1, 0], [0, -1]])
    assert affinity.places(offsets, offsets) == [0, 1, 2, 3]
    assert affinity.places(np.array([[0, -1], [1, 0], [1, 0]]), offsets) == [3, 0, 2]
    with pytest.raises(ValueError, match=r"there is no offset \(1, 0\)"):
        affinity.places(np.array([[1, 0]] * 3), offsets)


@pytest.mark.parametrize("dilations", [(), (0,), (-1, 2), (1.5,), (2, 2)])
def test_bad_dilations_are_refused_with_what_was_found(dilations):
    with pytest.raises(ValueError, match=r"dilations are \("):
        affinity.offsets(dilations)


def test_zero_dimensions_are_refused():
    with pytest.raises(ValueError, match="ndim is 0"):
        affinity.offsets((1,), 0)


@hypothesis.given(label_maps(), st.integers(-12, 12), st.integers(-12, 12))
def test_shift_reads_the_neighbour_and_fills_outside(x, dy, dx):
    moved = affinity.shift(x[..., None], (dy, dx), 7)[..., 0]
    expected = np.full_like(x, 7)
    for i, _, j in oracles.pairs(x.shape, [(dy, dx)]):
        expected[i] = x[j]
    np.testing.assert_array_equal(moved, expected)


def test_shift_needs_a_channel_axis():
    with pytest.raises(ValueError, match=r"x has shape \(4, 4\)"):
        affinity.shift(jnp.zeros((4, 4)), (0, 1))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@hypothesis.given(data=st.data())
def test_targets_equal_the_pairwise_loops(ndim, data):
    labels = data.draw(label_maps(ndim, max_side=5))
    offsets = affinity.offsets(data.draw(DILATIONS), ndim)
    target, valid = affinity.targets(labels, offsets)
    expected_target, expected_valid = oracles.targets(labels, offsets)
    np.testing.assert_array_equal(target, expected_target)
    np.testing.assert_array_equal(valid, expected_valid)


def test_borders_and_ignored_pixels_are_no_class_edges():
    """The trap of zero-padded one-hot labels: every border and ignored pixel would be an edge."""
    labels = np.zeros((5, 5), np.uint8)
    labels[2, 2] = 255
    target, valid = affinity.targets(labels, affinity.offsets((1,)))
    edges = np.asarray(valid & ~target)
    assert edges.sum() == 0
    # 5x5 pixels have 2·(4·5·2 + 4·4·2) = 144 ordered neighbour pairs; 16 touch the centre.
    assert np.asarray(valid).sum() == 144 - 16


@pytest.mark.parametrize("shape", [(2, 9, 11), (1, 1), (3, 2, 1, 7), (1, 20, 5)])
def test_neighbours_by_product_are_those_by_shifts(shape):
    """What a TPU runs; every label there is, and dilations beyond the map."""
    labels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    labels.flat[0] = 255
    for dilations in ((1, 2, 4, 8), (3,)):
        offsets = affinity.offsets(dilations)
        with jax.default_matmul_precision("bfloat16"):
            found = affinity.neighbours_by_product(jnp.asarray(labels), offsets, 255)
        expected = affinity.neighbours(jnp.asarray(labels), offsets, 255)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.uint8


def test_pair_weights_are_the_mean_of_both_ends_and_0_without_a_pair():
    labels = np.array([[0, 2, 255, 1]], np.uint8)
    found = affinity.pair_weights(labels, affinity.offsets((1,)), (1.0, 10.0, 4.0))
    assert found.shape == (1, 4, 8)
    # Left and right neighbours are channels 3 and 4.
    np.testing.assert_array_equal(found[0, :, 3], [0, 2.5, 0, 0])
    np.testing.assert_array_equal(found[0, :, 4], [2.5, 0, 0, 0])
    assert not np.asarray(found)[..., [0, 1, 2, 5, 6, 7]].any()
    # A label without a weight would be a silent 1 or 0 otherwise.
    unknown = affinity.pair_weights(np.array([[0, 3]]), affinity.offsets((1,)), (1.0, 10.0, 4.0))
    assert np.isnan(unknown).any()
    for wrong in ((), (1.0, -1.0), ((1.0,),)):
        with pytest.raises(ValueError, match="expected \\[C\\] numbers, 0 or more"):
            affinity.pair_weights(labels, affinity.offsets((1,)), wrong)


def test_another_ignore_label_may_be_chosen():
    labels = np.array([[0, 3]])
    _, valid = affinity.targets(labels, affinity.offsets((1,)), ignore_label=3)
    assert not np.asarray(valid).any()


def test_targets_keep_leading_axes_and_work_under_jit():
    labels = np.random.default_rng(0).integers(0, 3, (2, 3, 6, 5))
    offsets = affinity.offsets((1, 2))
    target, valid = jax.jit(lambda x: affinity.targets(x, offsets))(labels)
    assert target.shape == valid.shape == (2, 3, 6, 5, 16)
    np.testing.assert_array_equal(target[1, 2], oracles.targets(labels[1, 2], offsets)[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 4)), "dtype float"),
        (np.zeros(4, int), "at least 2 axes"),
        (np.full((3, 3), np.nan), "float"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        affinity.targets(labels, affinity.offsets())


@pytest.mark.parametrize("offsets", [np.zeros((0, 2), int), np.zeros(3, int), np.ones((8, 2)), [1]])
def test_bad_offsets_are_refused_with_their_shape(offsets):
    with pytest.raises(ValueError, match=r"offsets have shape \(.*expected integers \[K, ndim\]"):
        affinity.targets(np.zeros((3, 3), int), offsets)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@hypothesis.given(data=st.data())
def test_symmetric_offsets_give_symmetric_affinities(ndim, data):
    """Mirroring the forward half of the ground truth gives the whole of it."""
    labels = data.draw(label_maps(ndim, max_side=5))
    dilations = data.draw(DILATIONS)
    offsets = affinity.offsets(dilations, ndim)
    half, _ = affinity.targets(labels, affinity.offsets(dilations, ndim, symmetric=True))
    target, valid = map(np.asarray, affinity.targets(labels, offsets))
    np.testing.assert_array_equal(affinity.mirror(half, offsets), target)
    for i, k, j in oracles.pairs(labels.shape, offsets):
        back = (offsets == -offsets[k]).all(axis=1).argmax()
        assert target[i][k] == target[j][back]
        assert valid[i][k] == valid[j][back]


def test_mirror_refuses_a_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r"half has shape \(2, 4, 4, 5\); expected .* 16\]"):
        affinity.mirror(jnp.zeros((2, 4, 4, 5)), affinity.offsets())


def test_mirror_refuses_offsets_without_their_opposites():
    with pytest.raises(ValueError, match="has no opposite"):
        affinity.mirror(jnp.zeros((2, 4, 4, 4)), affinity.offsets((1,), symmetric=True))


@hypothesis.given(label_maps(max_side=20), st.integers(1, 9), st.integers(1, 9))
def test_downsampled_labels_are_the_nearest_at_half_pixel_centres(labels, height, width):
    found = np.asarray(affinity.downsample_labels(labels, (height, width)))
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * labels.shape[0] / height, (j + 0.5) * labels.shape[1] / width
            assert found[i, j] == labels[int(y + 1e-9), int(x + 1e-9)]


def test_downsampled_labels_equal_torch_nearest_exact():
    torch = pytest.importorskip("torch")
    labels = np.random.default_rng(0).integers(0, 255, (2, 513, 129)).astype(np.uint8)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(labels)[:, None].float(), (129, 33), mode="nearest-exact"
    )[:, 0]
    np.testing.assert_array_equal(affinity.downsample_labels(labels, (129, 33)), expected)


def test_soft_targets_on_whole_cells_of_one_class_are_the_hard_ones():
    coarse = np.random.default_rng(1).choice([0, 1, 2, 255], (2, 7, 5))
    offsets = affinity.offsets((1, 2))
    soft = affinity.soft_targets(coarse.repeat(4, 1).repeat(4, 2), offsets, (7, 5), num_classes=3)
    hard = affinity.targets(coarse, offsets)
    np.testing.assert_allclose(soft[0], hard[0], atol=1e-6)
    np.testing.assert_array_equal(soft[1], hard[1])


def test_soft_targets_are_the_chance_that_two_labelled_pixels_agree():
    labels = np.array([[0, 0, 0, 1], [0, 255, 1, 1]])
    target, valid = affinity.soft_targets(labels, np.array([[0, 1]]), (1, 2), num_classes=2)
    left, right = [0, 0, 0], [0, 1, 1, 1]
    agree = np.mean([a == b for a in left for b in right])
    np.testing.assert_allclose(target[0, :, 0], [agree, 0])
    assert valid[0, :, 0].tolist() == [True, False]


def test_soft_targets_against_skimage_area_pooling():
    labels = np.random.default_rng(2).integers(0, 3, (8, 12))
    shares = np.stack(
        [skimage.measure.block_reduce(labels == c, (4, 4), np.mean) for c in range(3)], axis=-1
    )
    target, _ = affinity.soft_targets(labels, np.array([[1, 1]]), (2, 3), num_classes=3)
    np.testing.assert_allclose(target[0, 1, 0], shares[0, 1] @ shares[1, 2], atol=1e-6)


def test_soft_targets_need_whole_cells():
    with pytest.raises(ValueError, match=r"labels of size \(5, 4\) cannot be pooled to \(2, 2\)"):
        affinity.soft_targets(np.zeros((5, 4), int), affinity.offsets((1,)), (2, 2), 2)


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_void_takes_the_class_beside_it_within_reach(reach):
    """Against distances along the grid: filled are pixels as near, with a class as near."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.repeat(rng.integers(0, 4, (4, 5)), 6, 0), 5, 1).astype(np.uint8)
    labels[:, 4:8] = 255  # a strip
    labels[12:20, 10:25] = 255  # a large area
    labels[0, 0] = 255
    found = np.asarray(affinity.close_void(jnp.asarray(labels)[None], reach)[0])
    void = labels == 255
    distance = scipy.ndimage.distance_transform_cdt(void, "taxicab")
    np.testing.assert_array_equal(found == 255, distance > reach)
    np.testing.assert_array_equal(found[~void], labels[~void])
    rows, columns = np.nonzero(~void)
    for y, x in np.argwhere(void & (distance <= reach)):
        away = np.abs(rows - y) + np.abs(columns - x)
        near = labels[rows[away == distance[y, x]], columns[away == distance[y, x]]]
        assert found[y, x] in near
    assert found.dtype == np.uint8


def test_a_closed_strip_has_class_edges_at_dilation_one():
    labels = np.zeros((1, 8, 12), np.uint8)
    labels[:, :, 6:] = 1
    labels[:, :, 4:8] = 255
    offsets = affinity.offsets((1,))
    open_, closed = (
        affinity.targets(affinity.close_void(jnp.asarray(labels), n), offsets) for n in (0, 2)
    )
    assert (np.asarray(open_[0]) | ~np.asarray(open_[1])).all()
    edges = ~np.asarray(closed[0]) & np.asarray(closed[1])
    assert edges[0, 1:-1, [5, 6]].any()
    assert not edges[0, :, :4].any()
