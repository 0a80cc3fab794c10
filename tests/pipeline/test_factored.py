"""The factored projection, against its dense matrix built entry by entry, and over seeds."""

import numpy as np
import pytest
import torch

from pipeline.factored import FactoredProjection
from pipeline.features import projection_for, sketch_gradients, sketcher
from pipeline.gradients import backward
from pipeline.packing import pack, passes
from pipeline.projection import hashed
from pipeline.records import keyed_seed
from tests.oracles import gradients_by_loop

POLICIES = ["llama", "qwen3", "qwen2", "adapted"]


def side(seed, name, which, size, p):
    """One side's (p, size) matrix, coordinate by coordinate."""
    rolls = hashed(keyed_seed("factored roll", seed, name, which), -(-size // p))
    signs = hashed(keyed_seed("factored sign", seed, name, which), size)
    matrix = np.zeros((p, size))
    for i in range(size):
        matrix[(i % p + int(rolls[i // p] % np.uint64(p))) % p, i] = 1.0 if signs[i] & np.uint64(1) else -1.0
    return matrix


def by_matrix(projection, name, grad):
    """The sketch of one parameter's gradient: S G T^T, where anything but a matrix is one column."""
    g = grad.double().numpy()
    g = g.reshape(g.shape[0], -1) if g.ndim == 2 else g.reshape(-1, 1)
    s = side(projection.seed, name, "out", g.shape[0], projection.side)
    return s @ g @ side(projection.seed, name, "in", g.shape[1], projection.side).T


def layers_of(policy, rollouts):
    """What one backward pass holds at each layer, to be sketched more than once."""
    layers = []
    for parts in passes(pack(rollouts), 65_536):
        backward(policy, rollouts, "grpo", lambda *layer: layers.append(layer), parts, list(rollouts.groups()))
    return layers


def sketch(layers, projection):
    """The sketches of all prompts from the layers of one pass."""
    table = projection.zeros(len(layers[0][1]))
    for layer in layers:
        sketcher(projection, table)(*layer)
    return projection.finish(table).numpy()


@pytest.mark.parametrize("fixture", POLICIES)
@pytest.mark.parametrize("dim_out", [9, 120])
def test_the_sketch_is_its_matrix_on_exact_gradients(request, fixture, make_rollouts, dim_out):
    """Each prompt's sketch is the sum over parameters of S G T^T, whose G is that of a backward pass of its own."""
    policy = request.getfixturevalue(fixture)
    rollouts = make_rollouts(policy)
    projection = projection_for(policy, dim_out, kind="factored", seed=3)
    loop = gradients_by_loop(policy, rollouts, "grpo")
    uids, rows = sketch_gradients(policy, rollouts, "grpo", projection)
    for uid, row in zip(uids, rows, strict=True):
        expected = sum(by_matrix(projection, name, grad) for name, grad in loop[uid].items()).ravel()
        assert row == pytest.approx(expected, abs=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("fixture", POLICIES)
def test_inner_products_are_unbiased(request, fixture, make_rollouts):
    """Over 24 seeds the mean inner product of two prompts' sketches is within four standard errors of the true one."""
    policy = request.getfixturevalue(fixture)
    rollouts = make_rollouts(policy)
    loop = gradients_by_loop(policy, rollouts, "grpo")
    one, other = list(loop)[:2]
    true = float(sum((loop[one][n] * loop[other][n]).sum() for n in loop[one]))
    layers = layers_of(policy, rollouts)
    sketches = [sketch(layers, projection_for(policy, 400, kind="factored", seed=seed)) for seed in range(24)]
    seen = [float(rows[0] @ rows[1]) for rows in sketches]
    assert abs(np.mean(seen) - true) < 4 * np.std(seen, ddof=1) / np.sqrt(len(seen))


def test_more_dimensions_err_less(llama, make_rollouts):
    """The error of a cosine falls as the sketch grows."""
    rollouts = make_rollouts(llama)
    loop = gradients_by_loop(llama, rollouts, "grpo")
    flat = torch.stack([torch.cat([g.flatten() for g in grads.values()]) for grads in loop.values()]).numpy()

    layers = layers_of(llama, rollouts)

    def cosine(x):
        return float(x[0] @ x[1] / np.linalg.norm(x[0]) / np.linalg.norm(x[1]))

    def error(dim_out):
        made = [sketch(layers, projection_for(llama, dim_out, kind="factored", seed=s)) for s in range(8)]
        return np.sqrt(np.mean([(cosine(rows) - cosine(flat)) ** 2 for rows in made]))

    assert error(900) < error(25) / 2


def test_bad_arguments_are_refused(llama):
    """A sketch too small or larger than the gradient, dropped coordinates, and unknown names are refused."""
    with pytest.raises(ValueError, match="dim_out = 3"):
        projection_for(llama, 3, kind="factored")
    with pytest.raises(ValueError, match="dim_out = 9: from 4 to the gradient's 6"):
        FactoredProjection(9, layout={"w": 6})
    with pytest.raises(ValueError, match=r"keep = 0\.5"):
        projection_for(llama, 16, kind="factored", keep=0.5)
    with pytest.raises(ValueError, match="'other' is not in the layout"):
        FactoredProjection(4, layout={"w": 6}).fold("other", "in", torch.ones(1, 1, 6))
