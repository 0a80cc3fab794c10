"""The sparse projection, against its dense matrix, over seeds, and against scikit-learn's."""

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from sklearn.random_projection import SparseRandomProjection

from pipeline.projection import WIDTH, SparseProjection
from tests.oracles import dense_projection

LAYOUT = {"embed": 20, "layer.weight": 33, "bias": 1, "head": 46}
DIM = sum(LAYOUT.values())


def draw(rows, dim=DIM, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32))


def split(rows):
    return dict(zip(LAYOUT, rows.split(list(LAYOUT.values()), dim=1), strict=True))


@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("dim_out", [1, 16, 100])
@pytest.mark.parametrize("width", [7, 31, WIDTH])
def test_projection_is_its_dense_matrix(keep, dim_out, width, monkeypatch):
    """The sketch is the product with a matrix built coordinate by coordinate from the hashes' definition."""
    monkeypatch.setattr("pipeline.projection.WIDTH", width)
    rows, dim_out = draw(5), min(dim_out, width)
    sketch = SparseProjection(DIM, dim_out, keep=keep, seed=7, layout=LAYOUT)(rows)
    assert sketch.numpy() == pytest.approx(
        rows.double().numpy() @ dense_projection(LAYOUT, dim_out, keep=keep, seed=7, width=width), abs=1e-5
    )
    assert sketch.dtype == torch.float32


@pytest.mark.parametrize("order", list(permutations(LAYOUT))[::5])
def test_parameters_may_come_in_any_order(order):
    """Streamed parameter by parameter, in any order, the sketch of whole numbers is exactly that of the flat call."""
    rows = draw(4).mul(10).round()  # whole numbers: float32 sums are exact, so that equality judges the map alone
    projection = SparseProjection(DIM, 16, layout=LAYOUT)
    sketch, parts = projection.zeros(4), split(rows)
    for name in order:
        projection.add(sketch, name, parts[name])
    assert torch.equal(projection.finish(sketch), projection(rows))


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("width", [7, WIDTH])
@pytest.mark.parametrize("seed", range(5))
def test_parameters_may_come_in_shards(keep, width, seed, monkeypatch):
    """Cut anywhere, in any order, added twice by halves, and row by row: the sketch is exactly that of the flat call."""
    monkeypatch.setattr("pipeline.projection.WIDTH", width)
    rng, rows = np.random.default_rng(seed), draw(4).mul(10).round()
    projection = SparseProjection(DIM, 7, keep=keep, layout=LAYOUT)
    whole, table, shards = projection(rows) * np.sqrt(keep), projection.zeros(4), []
    for name, part in split(rows).items():
        cuts = [0, *sorted(rng.integers(0, LAYOUT[name] + 1, 3).tolist()), LAYOUT[name]]
        shards += [(name, part[:, a:b], a) for a, b in pairwise(cuts)]
    for i in rng.permutation(len(shards)):
        name, part, start = shards[i]
        for half in (part / 2, part / 2):
            projection.add(table, name, half, start=start)
    assert torch.equal((projection.finish(table) * np.sqrt(keep)).round(), whole.round())
    one = SparseProjection(DIM, 7, keep=keep, layout=LAYOUT)
    assert torch.cat([one(row[None]) for row in rows]).numpy() == pytest.approx(projection(rows).numpy(), abs=1e-4)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("width", [7, WIDTH])
def test_rows_of_a_matrix_may_come_alone(keep, width, monkeypatch):
    """The rows of an embedding that occurred give the sketch of the whole gradient, whose other rows are zero."""
    monkeypatch.setattr("pipeline.projection.WIDTH", width)
    projection = SparseProjection(60, 6, keep=keep, layout={"embed": 60})
    grads, rows = draw(1, 12).mul(10).round().view(3, 4), torch.tensor([11, 0, 7])
    dense = torch.zeros(15, 4)
    dense[rows] = grads
    table = projection.zeros(1)
    projection.add_rows(table[0], "embed", grads, rows)
    assert projection.finish(table).numpy() == pytest.approx(projection(dense.view(1, -1)).numpy(), abs=1e-4)


def test_the_layout_order_does_not_matter():
    """Two models that list the same parameters in another order share one map and one identity."""
    rows = draw(3).mul(10).round()
    reverse = dict(reversed(LAYOUT.items()))
    flipped = torch.cat([split(rows)[name] for name in reverse], dim=1)
    one, other = SparseProjection(DIM, 16, layout=LAYOUT), SparseProjection(DIM, 16, layout=reverse)
    assert torch.equal(one(rows), other(flipped))
    assert one.identity == other.identity


def test_the_seed_decides_the_map():
    """The same seed gives the same map, another seed another one, and the identity tells them apart."""
    rows = draw(2)
    one, same, other = (SparseProjection(DIM, 64, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one(rows), same(rows))
    assert not torch.allclose(one(rows), other(rows))
    assert one.identity == same.identity != other.identity
    assert one.identity != SparseProjection(DIM, 64, seed=1, keep=0.5).identity


@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_inner_products_are_unbiased(keep):
    """Over 200 seeds the mean inner product of two sketches is within four standard errors of the true one."""
    a, b = draw(2, seed=5)
    b = a + b
    seen = []
    for seed in range(200):
        x, y = SparseProjection(DIM, 32, keep=keep, seed=seed)(torch.stack([a, b]))
        seen.append(float(x @ y))
    error = np.std(seen, ddof=1) / np.sqrt(len(seen))
    assert abs(np.mean(seen) - float(a @ b)) < 4 * error


def test_kept_coordinates_come_from_the_whole_range(monkeypatch):
    """Each tenth of the gradient keeps its share of coordinates, to four standard deviations."""
    monkeypatch.setattr("pipeline.projection.WIDTH", 61)
    dim, keep = 4000, 0.25
    kept = SparseProjection(dim, 8, keep=keep)(torch.eye(dim)).abs().sum(dim=1) > 0
    counts = kept.reshape(10, -1).sum(dim=1).numpy()
    each = dim / 10
    assert (np.abs(counts - keep * each) < 4 * np.sqrt(each * keep * (1 - keep))).all()


def test_the_error_of_a_cosine_is_that_of_a_dense_projection():
    """The error of cosines is near 1 / sqrt(dim_out), and no larger than scikit-learn's projection makes."""
    dim, dim_out = 3000, 256
    rows = draw(40, dim)
    pairs = np.triu_indices(40, 1)

    def error(sketch):
        def cosines(x):
            unit = x / np.linalg.norm(x, axis=1, keepdims=True)
            return (unit @ unit.T)[pairs]

        return np.sqrt(np.mean((cosines(sketch) - cosines(rows.numpy())) ** 2))

    ours = error(SparseProjection(dim, dim_out)(rows).numpy())
    peer = error(SparseRandomProjection(dim_out, random_state=0).fit_transform(rows.numpy()))
    assert 0.8 < ours * np.sqrt(dim_out) < 1.2
    assert ours < 1.2 * peer


def test_low_precision_is_summed_in_float32():
    """A bfloat16 gradient is sketched in float32."""
    rows = draw(2).bfloat16()
    projection = SparseProjection(DIM, 8)
    assert torch.equal(projection(rows), projection(rows.float()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim_in": 0, "dim_out": 4}, "dim_in = 0"),
        ({"dim_in": 4, "dim_out": 0}, "dim_out = 0"),
        ({"dim_in": 4, "dim_out": 5}, "dim_out = 5 exceeds the gradient's 4"),
        ({"dim_in": 10**6, "dim_out": 70_000}, "dim_out = 70000 exceeds 65521"),
        ({"dim_in": 4, "dim_out": 4, "keep": 0.0}, r"keep = 0\.0"),
        ({"dim_in": 4, "dim_out": 4, "keep": 1.1}, r"keep = 1\.1"),
        ({"dim_in": 4, "dim_out": 4, "layout": {"a": 3}}, "layout adds up to 3"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    """Sizes that are not positive, shares outside (0, 1] and a layout that does not add up are refused."""
    with pytest.raises(ValueError, match=message):
        SparseProjection(**arguments)


@pytest.mark.parametrize(("name", "size"), [("head", 47), ("unknown", 46)])
def test_a_parameter_outside_the_layout_is_refused(name, size):
    """A parameter of another name or size is refused by name."""
    projection = SparseProjection(DIM, 8, layout=LAYOUT)
    with pytest.raises(ValueError, match=name):
        projection.add(projection.zeros(2), name, draw(2, size))
