"""The sketch of a gradient against reading it once, and against what others do; how far it is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.gradients import prompt_gradients
from pipeline.projection import SparseProjection
from tests.benchmarks.measure import Row, installed, ratio
from tests.benchmarks.policies import arithmetic, learned

SUBJECT, DIM, ROWS = "sketch", 8192, 8
COLUMNS = 200  # of TRAK's and dattri's dense matrix, two blocks of their default size


def measure(small: bool) -> Iterator[Row]:
    """Yield speed at 1e7 and at 1e6 coordinates, then accuracy on real gradients."""
    torch.manual_seed(0)
    rows = torch.randn(ROWS, 10**6 if small else 10**7)
    projection = SparseProjection(rows.shape[1], DIM)
    yield _row("project / read once", ratio(lambda: projection(rows), rows.sum), "<= 3", rows)
    yield _row("index_add / project", ratio(_index_add(rows), lambda: projection(rows), 3), ">= 7", rows)
    del rows, projection
    rows = torch.randn(ROWS, 10**5 if small else 10**6)
    projection = SparseProjection(rows.shape[1], DIM)
    transform = _scikit_learn(rows)
    yield _row("scikit-learn transform / project", ratio(transform, lambda: projection(rows), 3), ">= 20", rows,
               "its matrix is drawn here at its automatic density: fitting takes minutes")  # fmt: skip
    for peer, make in (("traker", _trak), ("dattri", _dattri)):
        value = DIM / COLUMNS * ratio(make(rows), lambda: projection(rows), 3) if installed(peer) else None
        note = f"{COLUMNS} columns, times {DIM / COLUMNS:.0f}: cost is linear in columns"
        yield _row(f"{peer} BasicProjector, normal / project", value, ">= 1000", rows, note)
    yield from accuracy(40 if small else 160)


def accuracy(prompts: int) -> Iterator[Row]:
    """Yield how well projected inner products and cosines agree with the exact ones."""
    grads = exact_gradients(prompts)
    projection = SparseProjection(grads.shape[1], DIM)
    exact, cosine = _pairs(grads.double())
    ours, ours_cosine = _pairs(projection(grads).double())
    note = f"{len(grads)} prompts of the embedded policy, {grads.shape[1]:,} coordinates, k = {DIM}"
    yield Row(SUBJECT, "Pearson r of inner products", float(np.corrcoef(exact, ours)[0, 1]), "", ">= 0.998", note)
    rmse = float(np.sqrt(np.mean((cosine - ours_cosine) ** 2)))
    yield Row(SUBJECT, "RMSE of cosines", rmse, "", "<= 0.012", f"spread of the exact cosines {cosine.std():.3f}")


def exact_gradients(prompts: int) -> Tensor:
    """Return the whole gradients of some prompts, (prompts, dim)."""
    policy, rollouts = learned(), arithmetic(prompts, 1)
    found = {name: torch.zeros(len(rollouts.groups()), *p.shape) for name, p in policy.trainable().items()}

    def sink(name: str, prompts: slice, grads: Tensor, rows: Tensor | None = None) -> None:
        if rows is None:
            found[name][prompts] += grads
        else:
            found[name][prompts.start].index_add_(0, rows, grads[0])

    prompt_gradients(policy, rollouts, "grpo", sink)
    return torch.cat([part.flatten(1) for part in found.values()], dim=1)


def _row(name: str, value: float | None, bar: str, rows: Tensor, note: str = "") -> Row:
    return Row(SUBJECT, f"{name}, {rows.shape[0]} x {rows.shape[1]:.0e} to {DIM}", value, bar=bar, note=note)


def _pairs(rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    gram = (rows @ rows.T).numpy()
    upper = np.triu_indices(len(gram), 1)
    return gram[upper], (gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram))))[upper]


def _index_add(rows: Tensor) -> Callable[[], object]:
    bucket = torch.randint(0, DIM, (rows.shape[1],), dtype=torch.int32)
    sign = torch.randint(0, 2, (rows.shape[1],)).float() * 2 - 1
    return lambda: torch.zeros(len(rows), DIM).index_add_(1, bucket, rows * sign)


def _scikit_learn(rows: Tensor) -> Callable[[], object]:
    from scipy.sparse import csr_matrix
    from sklearn.random_projection import SparseRandomProjection

    rng, dim = np.random.default_rng(0), rows.shape[1]
    density = 1 / np.sqrt(dim)
    counts = rng.binomial(dim, density, DIM)
    starts = np.concatenate([[0], np.cumsum(counts)])
    columns = np.concatenate([np.sort(rng.integers(0, dim, count)) for count in counts]).astype(np.int32)
    values = (rng.integers(0, 2, len(columns)) * 2 - 1).astype(np.float32) / np.float32(np.sqrt(density * DIM))
    projection = SparseRandomProjection(n_components=DIM, dense_output=True)
    projection.components_ = csr_matrix((values, columns, starts), shape=(DIM, dim))
    projection.n_components_, projection.density_, projection.n_features_in_ = DIM, density, dim
    dense = rows.numpy()
    return lambda: projection.transform(dense)


def _trak(rows: Tensor) -> Callable[[], object]:
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(rows.shape[1], COLUMNS, 0, ProjectionType.normal, torch.device("cpu"))
    return lambda: projector.project(rows, model_id=0)


def _dattri(rows: Tensor) -> Callable[[], object]:
    from dattri.func.projection import BasicProjector, ProjectionType

    projector = BasicProjector(rows.shape[1], COLUMNS, 0, ProjectionType.normal, torch.device("cpu"))
    return lambda: projector.project(rows, ensemble_id=0)
