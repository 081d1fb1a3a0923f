"""Independent ways to compute the method: plain loops, a sparse matrix, and torch.

Written for being obviously right. The benchmarks time the last two.
"""

import itertools

import numpy as np
import scipy.sparse
import torch


def pairs(spatial, offsets):
    """Yields (i, k, j): pixel i, offset number k, and the pixel j = i + o if it is in the image."""
    for i in itertools.product(*map(range, spatial)):
        for k, offset in enumerate(offsets):
            j = tuple(int(a + b) for a, b in zip(i, offset, strict=True))
            if all(0 <= a < n for a, n in zip(j, spatial, strict=True)):
                yield i, k, j


def targets(labels, offsets, ignore_label=255):
    """Ground truth of one label map `[*spatial]`, pair by pair."""
    target = np.zeros((*labels.shape, len(offsets)), bool)
    valid = np.zeros_like(target)
    for i, k, j in pairs(labels.shape, offsets):
        valid[i][k] = labels[i] != ignore_label and labels[j] != ignore_label
        target[i][k] = valid[i][k] and labels[i] == labels[j]
    return target, valid


def loop_random_walk(
    probs, affinity, offsets, *, steps, sharpness=1.0, threshold=0.0, self_weight=1.0, restart=0.0
):
    """`propagate.random_walk` of one image `[*spatial, C]` in float64, pair by pair."""
    start = p = probs.astype(np.float64)
    for _ in range(steps):
        total = np.full(p.shape[:-1], float(self_weight))
        moved = self_weight * p
        for i, k, j in pairs(p.shape[:-1], offsets):
            a = float(affinity[i][k])
            w = a**sharpness if a > threshold else 0.0
            moved[i] += w * p[j]
            total[i] += w
        alone = total == 0
        walked = np.where(alone[..., None], p, moved / np.where(alone, 1, total)[..., None])
        p = (1 - restart) * walked + restart * start
    return p


def loop_signed(probs, affinity_logits, offsets, *, steps, strength, bias=0.0, repulsion=1.0):
    """`propagate.signed` of one image `[*spatial, C]` in float64, pair by pair."""
    q = probs.astype(np.float64)
    unary = np.log(np.maximum(q, 1e-30))
    bias = np.broadcast_to(bias, len(offsets))
    for _ in range(steps):
        score = unary.copy()
        for i, k, j in pairs(q.shape[:-1], offsets):
            vote = float(affinity_logits[i][k]) - bias[k]
            score[i] += strength * (vote if vote > 0 else repulsion * vote) * q[j]
        score -= score.max(axis=-1, keepdims=True)
        q = np.exp(score) / np.exp(score).sum(axis=-1, keepdims=True)
    return q


def csr_matrix(affinity, offsets, self_weight=1.0):
    """The row-stochastic matrix P of one image's walk, `[N, N]` with N pixels, float32 CSR."""
    *spatial, _ = affinity.shape
    n = int(np.prod(spatial))
    index = np.arange(n).reshape(spatial)
    rows, columns, values = [index.ravel()], [index.ravel()], [np.full(n, self_weight, np.float32)]
    for k, offset in enumerate(offsets):
        if any(abs(o) >= size for o, size in zip(offset, spatial, strict=True)):
            continue
        here = tuple(
            slice(max(0, -o), size - max(0, o)) for o, size in zip(offset, spatial, strict=True)
        )
        there = tuple(
            slice(max(0, o), size - max(0, -o)) for o, size in zip(offset, spatial, strict=True)
        )
        rows.append(index[here].ravel())
        columns.append(index[there].ravel())
        values.append(affinity[here][..., k].ravel())
    matrix = scipy.sparse.csr_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(n, n)
    )
    total = np.asarray(matrix.sum(axis=1))
    return scipy.sparse.diags_array(1 / total[:, 0], dtype=np.float32).tocsr() @ matrix


def csr_random_walk(probs, affinity, offsets, *, steps, self_weight=1.0):
    """The walk of one image `[*spatial, C]` as products with `csr_matrix`."""
    matrix = csr_matrix(affinity, offsets, self_weight)
    p = probs.reshape(-1, probs.shape[-1])
    for _ in range(steps):
        p = matrix @ p
    return p.reshape(probs.shape)


def torch_random_walk(probs, affinity, offsets, *, steps, self_weight=1.0):
    """The walk as torch users write it, shift-and-add: `[B, C, H, W]` and `[B, K, H, W]`."""
    height, width = probs.shape[2:]
    reach = int(np.abs(offsets).max())
    windows = [
        (..., slice(reach + y, reach + y + height), slice(reach + x, reach + x + width))
        for y, x in offsets.tolist()
    ]

    def pad(x):
        return torch.nn.functional.pad(x, (reach,) * 4)

    inside = pad(torch.ones_like(probs[:1, :1]))
    weights = affinity * torch.cat([inside[window] for window in windows], dim=1)
    total = self_weight + weights.sum(dim=1, keepdim=True)
    weights, own = weights / total, self_weight / total
    for _ in range(steps):
        padded, probs = pad(probs), own * probs
        for k, window in enumerate(windows):
            probs = torch.addcmul(probs, weights[:, k : k + 1], padded[window])
    return probs
