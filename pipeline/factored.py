r"""Projection of layer gradients from their two factors, without ever forming them: for many short samples.

The gradient of a linear layer is a sum of outer products. A CountSketch of each factor gives a sketch of the product,
and all layers share one sketch:

    G_l = sum_t b_t a_t^T        z = sum_l S_l b (T_l a)^T = sum_l S_l G_l T_l^T        E <z, z'> = sum_l <G_l, G'_l>

a, b   inputs and output gradients of layer l       (tokens, in), (tokens, out)
S, T   CountSketches, keyed by (seed, parameter name, side): blocks of p coordinates are rolled, each coordinate signed
z      sketch                                        (p, p), p = floor(sqrt(dim_out))

A product of two sketches errs by the order of 1 / sqrt(p) on gradients of low rank, more than ``pipeline.projection``
at the same size, and costs several times less than the weight gradients that it replaces. Summing over layers rather
than concatenating them keeps p large: at equal size its error is a third of that of one small sketch a layer (LoGra,
arXiv:2405.13954).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.projection import hashed
from pipeline.records import keyed_seed

REVISION = 1
NARROW = 1 << 15  # entries of a sketch's matrix up to which it is kept and multiplied by: calls cost more than flops
SHORT = 64  # the same for blocks up to this length, however many


class FactoredProjection:
    """A seeded linear map from the factors of a gradient to p x p coordinates.

    Args:
        dim_out: size of the sketch; the largest square within it is used, and ``dim_out`` becomes that square.
        seed: with the parameter names, decides every roll and sign.
        layout: sizes of the named parameters that are projected.

    Raises:
        ValueError: ``dim_out`` is below 4, or exceeds the gradient.
    """

    def __init__(self, dim_out: int, *, seed: int = 0, layout: Mapping[str, int]) -> None:
        if not 4 <= dim_out <= sum(layout.values()):
            raise ValueError(f"dim_out = {dim_out}: from 4 to the gradient's {sum(layout.values())} coordinates")
        self.side = math.isqrt(dim_out)
        self.dim_out, self.seed, self.layout = self.side**2, seed, dict(layout)
        self._sides: dict[tuple[str, str, int, torch.device], tuple[list[int], Tensor, Tensor | None]] = {}

    @property
    def identity(self) -> dict[str, object]:
        """What names this projection: two with equal identity map equal gradients to equal sketches."""
        return {
            "kind": "factored",
            "dim_out": self.dim_out,
            "seed": self.seed,
            "layout": sorted(self.layout.items()),
            "revision": REVISION,
        }

    def zeros(self, rows: int, device: torch.device | str = "cpu") -> Float[Tensor, "prompts p p"]:
        """Return empty sketches, to which layers are added one by one."""
        return torch.zeros(rows, self.side, self.side, dtype=torch.float32, device=device)

    def product(
        self, name: str, a: Float[Tensor, "rows tokens in"], b: Float[Tensor, "rows tokens out"]
    ) -> Float[Tensor, "rows p p"]:
        """Return the sketch of each row's b^T a, in float32."""
        return self.fold(name, "out", b).transpose(1, 2) @ self.fold(name, "in", a)

    def looked_up(
        self, name: str, ids: Tensor, b: Float[Tensor, "rows tokens out"], *, vocabulary: int
    ) -> Float[Tensor, "rows p p"]:
        """Return the sketch of each row's embedding gradient, (vocabulary, out), whose rows are those at ``ids``.

        The vocabulary is the first side, as it is in a head that is tied to the embedding.
        """
        rolls, signs, _ = self._side(name, "out", vocabulary, ids.device)
        bucket = (ids % self.side + torch.tensor(rolls, device=ids.device)[ids // self.side]) % self.side
        one_hot = torch.nn.functional.one_hot(bucket, self.side).float() * signs[ids].unsqueeze(-1)
        return one_hot.transpose(1, 2) @ self.fold(name, "in", b)

    def whole(self, name: str, grads: Float[Tensor, "rows out in"]) -> Float[Tensor, "rows p p"]:
        """Return the sketch of each row's gradient of a matrix, where that is at hand after all."""
        return self.fold(name, "out", self.fold(name, "in", grads).transpose(1, 2)).transpose(1, 2)

    def vector(self, name: str, grads: Float[Tensor, "rows size"]) -> Float[Tensor, "rows p p"]:
        """Return the sketch of each row's gradient of a parameter that is no matrix: its first factor is a constant."""
        ones = torch.ones(len(grads), 1, 1, device=grads.device)
        return self.fold(name, "out", grads.unsqueeze(1)).transpose(1, 2) @ self.fold(name, "in", ones)

    def finish(self, table: Float[Tensor, "prompts p p"]) -> Float[Tensor, "prompts dim_out"]:
        """Return the sketches as rows."""
        return table.flatten(1)

    def fold(self, name: str, side: str, x: Float[Tensor, "rows tokens size"]) -> Float[Tensor, "rows tokens p"]:
        """Return the CountSketch of the last axis: blocks of p coordinates, rolled and added.

        Where blocks are short or few, the sketch's matrix is multiplied by instead: the same map in one call.
        """
        size, p = x.shape[-1], self.side
        rolls, signs, matrix = self._side(name, side, size, x.device)
        if matrix is not None:
            return x.float() @ matrix
        signed = x.float() * signs
        out = signed.new_zeros(*x.shape[:-1], p)
        for block, roll in enumerate(rolls):
            low, high = block * p, min(size, (block + 1) * p)
            split = min(high - low, p - roll)
            out[..., roll : roll + split] += signed[..., low : low + split]
            if split < high - low:
                out[..., : high - low - split] += signed[..., low + split : high]
        return out

    def _side(self, name: str, side: str, size: int, device: torch.device) -> tuple[list[int], Tensor, Tensor | None]:
        """Return the roll of each block and the sign of each coordinate of one side; their matrix if it is small."""
        if name not in self.layout:
            raise ValueError(f"parameter {name!r} is not in the layout, which holds {sorted(self.layout)[:8]}...")
        key = (name, side, size, device)
        if key not in self._sides:
            rolls = hashed(keyed_seed("factored roll", self.seed, name, side), -(-size // self.side))
            signs = hashed(keyed_seed("factored sign", self.seed, name, side), size) & np.uint64(1)
            rolled = [int(r % np.uint64(self.side)) for r in rolls]
            sign = torch.from_numpy(signs.astype(np.float32) * 2 - 1)
            matrix = None
            if self.side <= SHORT or size * self.side <= NARROW:
                i = torch.arange(size)
                matrix = torch.zeros(size, self.side)
                matrix[i, (i + torch.tensor(rolled)[i // self.side]) % self.side] = sign
                matrix = matrix.to(device)
            self._sides[key] = rolled, sign.to(device), matrix
        return self._sides[key]
