r"""Sparse random projection of gradients, one signed bucket a coordinate, drawn from all coordinates.

CROPI's sparse projection (arXiv:2510.26491), with the intended coordinate set; the sketch is a CountSketch
(Charikar et al. 2002), a sparse Johnson-Lindenstrauss transform with one nonzero a column.

    z_b = keep^(-1/2) sum { s(i) g_i : h(i) = b, i kept }          E <z, z'> = <g, g'>

g      gradient, all parameters                  (rows, dim_in)
z      its sketch                                (rows, dim_out)
h, s   bucket and sign of a coordinate: hashes of (seed, parameter name, coordinate within the parameter)

The hashes belong to the coordinate, not to its position, so any order or sharding of the parameters gives the same z,
and pool and validation are comparable. The cosine's error is 1 / sqrt(dim_out) per pair.
Departures: (1) ``keep`` = 1 by default: dropping coordinates sets an error floor that no ``dim_out`` removes, and at
``keep`` = 0.1 the published gain comes from a float16 cast that is not made here; (2) kept coordinates are drawn from
the whole gradient (the released code draws them from its first entries).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.records import keyed_seed

REVISION = 1


class SparseProjection:
    """A seeded linear map from ``dim_in`` to ``dim_out`` coordinates.

    Args:
        dim_in: number of coordinates of a gradient.
        dim_out: number of buckets k.
        keep: share of coordinates that are kept, uniform over the whole gradient; the rest is dropped.
        seed: with the parameter names, decides every bucket and sign.
        layout: sizes of the named parameters that make up the flat gradient, in order; one unnamed one by default.

    Raises:
        ValueError: a size is not positive, ``keep`` is outside (0, 1], or the layout does not add up to ``dim_in``.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        keep: float = 1.0,
        seed: int = 0,
        layout: Mapping[str, int] | None = None,
    ) -> None:
        if dim_in < 1 or dim_out < 1:
            raise ValueError(f"dim_in = {dim_in}, dim_out = {dim_out}: both must be positive")
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep = {keep}: a share in (0, 1]; 1 keeps every coordinate")
        self.layout = dict(layout) if layout is not None else {"": dim_in}
        if sum(self.layout.values()) != dim_in:
            raise ValueError(f"layout adds up to {sum(self.layout.values())} coordinates, dim_in = {dim_in}")
        self.dim_in, self.dim_out, self.keep, self.seed = dim_in, dim_out, keep, seed
        self._tables: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def identity(self) -> dict[str, object]:
        """What names this projection: two with equal identity map equal gradients to equal sketches."""
        return {
            "dim_out": self.dim_out,
            "keep": self.keep,
            "seed": self.seed,
            "layout": sorted(self.layout.items()),
            "revision": REVISION,
        }

    def __call__(self, rows: Float[Tensor, "prompts dim_in"]) -> Float[Tensor, "prompts dim_out"]:
        """Project flat gradients, whose coordinates follow the layout's order."""
        out = self.zeros(len(rows), rows.device)
        for name, part in zip(self.layout, rows.split(list(self.layout.values()), dim=1), strict=True):
            self.add(out, name, part)
        return out

    def zeros(self, rows: int, device: torch.device | str = "cpu") -> Float[Tensor, "prompts dim_out"]:
        """Return an empty sketch, to which parameters are added one by one."""
        return torch.zeros(rows, self.dim_out, dtype=torch.float32, device=device)

    def add(self, sketch: Float[Tensor, "prompts dim_out"], name: str, grads: Float[Tensor, "prompts size"]) -> None:
        """Add one parameter's share of the gradient to ``sketch``, in place and in float32.

        The map is linear, so a parameter may be added in several parts (micro-batches, tied uses).
        """
        if name not in self.layout or grads.shape[1] != self.layout[name]:
            raise ValueError(
                f"parameter {name!r} with {grads.shape[1]} coordinates is not in the layout, which has "
                f"{self.layout.get(name)}"
            )
        bucket, sign = self._table(name, sketch.device)
        sketch.index_add_(1, bucket, grads.to(torch.float32) * sign)

    def _table(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the bucket and the signed scale of each coordinate of a parameter."""
        if (name, device) not in self._tables:
            base = np.uint64(keyed_seed("projection", self.seed, name))
            bits = _mix(np.arange(self.layout[name], dtype=np.uint64) + base)
            bucket = ((bits >> np.uint64(32)) * np.uint64(self.dim_out)) >> np.uint64(32)
            sign = np.where(bits & np.uint64(1), 1.0, -1.0).astype(np.float32)
            if self.keep < 1.0:
                kept = (_mix(bits) >> np.uint64(11)).astype(np.float64) / 2.0**53 < self.keep
                sign *= kept.astype(np.float32) / np.float32(np.sqrt(self.keep))
            self._tables[name, device] = (
                torch.from_numpy(bucket.astype(np.int32)).to(device),
                torch.from_numpy(sign).to(device),
            )
        return self._tables[name, device]


def _mix(x: np.ndarray) -> np.ndarray:
    """Return the SplitMix64 output function (Steele et al. 2014): a bijection whose output bits look independent."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
