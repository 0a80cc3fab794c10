r"""Sparse random projection of gradients, one signed bucket a coordinate, in two stages that read the gradient once.

CROPI's sparse projection (arXiv:2510.26491), with the intended coordinate set; the second stage is a CountSketch
(Charikar et al. 2002), a sparse Johnson-Lindenstrauss transform with one nonzero a column.

    u_c = keep^(-1/2) sum { s_B(i) g_i : (i + r_B(i)) mod W = c, i kept }         B(i) = block of W coordinates of i
    z_b = sum { s(c) u_c : h(c) = b }                                    E <z, z'> = <g, g'>

g      gradient, all parameters                                         (prompts, dim_in)
u      table of prime width W = 65,521                                  (prompts, W)
z      its sketch                                                       (prompts, dim_out)
r_B, s_B   roll and sign of a block: hashes of (seed, parameter name, block within the parameter)
h, s       bucket and sign of a table entry: hashes of (seed, entry)

Adding whole blocks is a streaming sum, so a projection costs about two readings of the gradient; hashing each
coordinate by itself costs twenty. The hashes belong to the coordinate, not to its position, so any order or sharding of
the parameters gives the same z to rounding, and pool and validation are comparable. The cosine's error is
1 / sqrt(dim_out) per pair; the width is prime because rows of weights have power-of-two strides and would collide.
Departures: (1) ``keep`` = 1 by default: dropping coordinates sets an error floor that no ``dim_out`` removes, and at
``keep`` = 0.1 the published gain comes from a float16 cast that is not made here; (2) kept coordinates are drawn from
the whole gradient (the released code draws them from its first entries).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.records import keyed_seed

REVISION = 2
WIDTH = 65_521  # W, the largest prime below 2^16: a row of the table is 256 KiB and stays in cache


class SparseProjection:
    """A seeded linear map from ``dim_in`` to ``dim_out`` coordinates.

    Call it on flat gradients, or stream: ``zeros``, ``add`` for each parameter or shard of one, ``finish``.

    Args:
        dim_in: number of coordinates of a gradient.
        dim_out: number of buckets k.
        keep: share of coordinates that are kept, uniform over the whole gradient; the rest is dropped.
        seed: with the parameter names, decides every block's roll and sign, and every bucket.
        layout: sizes of the named parameters that make up the flat gradient, in order; one unnamed one by default.

    Raises:
        ValueError: a size is not positive, ``dim_out`` exceeds ``dim_in`` or the table, ``keep`` is outside (0, 1], or
            the layout does not add up to ``dim_in``.
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
        if dim_out > min(dim_in, WIDTH):
            raise ValueError(
                f"dim_out = {dim_out} exceeds the gradient's {dim_in} coordinates"
                if dim_out > dim_in
                else f"dim_out = {dim_out} exceeds {WIDTH}, the width of the first stage: its error would stay"
            )
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep = {keep}: a share in (0, 1]; 1 keeps every coordinate")
        self.layout = dict(layout) if layout is not None else {"": dim_in}
        if sum(self.layout.values()) != dim_in:
            raise ValueError(f"layout adds up to {sum(self.layout.values())} coordinates, dim_in = {dim_in}")
        self.dim_in, self.dim_out, self.keep, self.seed = dim_in, dim_out, keep, seed
        self._blocks: dict[str, tuple[list[int], list[float]]] = {}
        self._buckets: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def identity(self) -> dict[str, object]:
        """What names this projection: two with equal identity map equal gradients to equal sketches."""
        return {
            "kind": "sparse",
            "dim_out": self.dim_out,
            "keep": self.keep,
            "seed": self.seed,
            "layout": sorted(self.layout.items()),
            "revision": REVISION,
        }

    def __call__(self, rows: Float[Tensor, "prompts dim_in"]) -> Float[Tensor, "prompts dim_out"]:
        """Project flat gradients, whose coordinates follow the layout's order."""
        table = self.zeros(len(rows), rows.device)
        for name, part in zip(self.layout, rows.split(list(self.layout.values()), dim=1), strict=True):
            self.add(table, name, part)
        return self.finish(table)

    def zeros(self, rows: int, device: torch.device | str = "cpu") -> Float[Tensor, "prompts width"]:
        """Return an empty table u, to which parameters are added one by one."""
        return torch.zeros(rows, WIDTH, dtype=torch.float32, device=device)

    def add(
        self,
        table: Float[Tensor, "prompts width"],
        name: str,
        grads: Float[Tensor, "prompts size"],
        *,
        start: int = 0,
    ) -> None:
        """Add coordinates ``start``, ``start`` + 1, ... of a parameter to ``table``, in place and in float32.

        The map is linear, so a parameter may come in several parts: shards, micro-batches, tied uses.
        """
        size = self._size(name)
        if start < 0 or start + grads.shape[1] > size:
            raise ValueError(f"parameter {name!r} has {size} coordinates, not {start} to {start + grads.shape[1]}")
        rolls, signs = self._rolls(name)
        for block, low, high in _blocks(start, start + grads.shape[1]):
            piece = grads[:, low - start : high - start]
            if self.keep < 1.0:
                piece = piece * self._kept(name, piece.device)[low:high]
            at = (low - block * WIDTH + rolls[block]) % WIDTH
            split = min(high - low, WIDTH - at)
            table[:, at : at + split].add_(piece[:, :split], alpha=signs[block])
            if split < high - low:
                table[:, : high - low - split].add_(piece[:, split:], alpha=signs[block])

    def add_rows(
        self,
        table: Float[Tensor, " width"],
        name: str,
        grads: Float[Tensor, "rows width_of_row"],
        rows: Int[Tensor, " rows"],
    ) -> None:
        """Add some rows of one prompt's gradient of a matrix parameter, such as those of the tokens that occurred."""
        rolls, signs = self._rolls(name)
        coordinates = (rows[:, None] * grads.shape[1] + torch.arange(grads.shape[1], device=rows.device)).flatten()
        block = coordinates // WIDTH
        roll, sign = torch.tensor(rolls, device=rows.device), torch.tensor(signs, device=rows.device)
        values = grads.flatten().float() * sign[block]
        if self.keep < 1.0:
            values = values * self._kept(name, values.device)[coordinates]
        table.index_add_(0, (coordinates % WIDTH + roll[block]) % WIDTH, values)

    def finish(self, table: Float[Tensor, "prompts width"]) -> Float[Tensor, "prompts dim_out"]:
        """Return the sketch z of a full table."""
        if table.device not in self._buckets:
            bits = hashed(keyed_seed("projection", self.seed), WIDTH)
            bucket = ((bits >> np.uint64(32)) * np.uint64(self.dim_out)) >> np.uint64(32)
            sign = _signs(bits) / np.sqrt(self.keep)
            self._buckets[table.device] = (
                torch.from_numpy(bucket.astype(np.int64)).to(table.device),
                torch.from_numpy(sign.astype(np.float32)).to(table.device),
            )
        bucket_of, sign_of = self._buckets[table.device]
        return torch.zeros(len(table), self.dim_out, device=table.device).index_add_(1, bucket_of, table * sign_of)

    def _size(self, name: str) -> int:
        if name not in self.layout:
            raise ValueError(f"parameter {name!r} is not in the layout, which holds {sorted(self.layout)[:8]}...")
        return self.layout[name]

    def _rolls(self, name: str) -> tuple[list[int], list[float]]:
        """Return r and s of each block of a parameter."""
        if name not in self._blocks:
            bits = hashed(keyed_seed("projection", self.seed, name), -(-self._size(name) // WIDTH))
            roll = ((bits >> np.uint64(32)) * np.uint64(WIDTH)) >> np.uint64(32)
            self._blocks[name] = ([int(r) for r in roll], [float(s) for s in _signs(bits)])
        return self._blocks[name]

    def _kept(self, name: str, device: torch.device) -> Tensor:
        """Return which coordinates of a parameter are kept: one byte each, made once a device."""
        if (name, device) not in self._masks:
            bits = hashed(keyed_seed("kept", self.seed, name), self._size(name))
            kept = (bits >> np.uint64(11)).astype(np.float64) / 2.0**53 < self.keep
            self._masks[name, device] = torch.from_numpy(kept).to(device)
        return self._masks[name, device]


def hashed(base: int, count: int) -> np.ndarray:
    """Return 64 random-looking bits for each of 0, 1, ...: SplitMix64 (Steele et al. 2014) from a given base."""
    x = np.arange(count, dtype=np.uint64) + np.uint64(base)
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _signs(bits: np.ndarray) -> np.ndarray:
    return np.where(bits & np.uint64(1), 1.0, -1.0)


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (block, first, last + 1) of the blocks that coordinates ``start`` to ``stop`` lie in."""
    for block in range(start // WIDTH, -(-stop // WIDTH)):
        yield block, max(start, block * WIDTH), min(stop, (block + 1) * WIDTH)
