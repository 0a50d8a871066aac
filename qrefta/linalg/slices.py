"""The transformed slices of a stack, read in blocks of rows, and their products with vectors."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from qrefta.linalg.metric import Metric

# Makes a pass over a stack: rows, and (layers or slices, rows, in) of them, in the order of rows.
Blocks = Callable[[], Iterable[tuple[slice, Tensor]]]


class Slices(NamedTuple):
    """The transformed slices T_k of a stack, as blocks of rows.

    Attributes:
        blocks: makes a pass: blocks of (slices, rows, in).
        shape: (slices, out, in).
        device: of the blocks.
        metric: S of the inputs; None for the identity.
        tolerance: share of the captured energy that `t_svd` may leave to win.
    """

    blocks: Blocks
    shape: tuple[int, int, int]
    device: torch.device
    metric: Metric | None = None
    tolerance: float = 2e-3

    def weighted(self, vectors: Tensor) -> Tensor:
        """S^(1/2) vectors, (in, columns)."""
        return vectors if self.metric is None else self.metric.apply(vectors)

    def unweighted(self, vectors: Tensor) -> Tensor:
        """S^(-1/2) vectors, (in, columns)."""
        return vectors if self.metric is None else self.metric.apply_inverse(vectors)

    def multiply(self, vectors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """T_k S^(1/2) v and S^(1/2) T_k^T T_k S^(1/2) v for the vectors of every slice. One pass.

        Args:
            vectors: for every slice, (in, columns).

        Returns:
            For every slice (out, columns) and (in, columns), in the dtype of the blocks.
        """
        # All slices in one call are a fifth faster.
        batched = len({v.shape[1] for v in vectors}) == 1
        products: list[_Products] = []
        for rows, block in self.blocks():
            if not products:
                thin = [self.weighted(v).to(block.dtype) for v in vectors]
                if batched:
                    thin = [torch.stack(thin)]
                products = [_Products(columns, self.shape[1]) for columns in thin]
            parts = [block] if batched else block
            for product, part in zip(products, parts, strict=True):
                product.add(rows, part)
        images = [product.images for product in products]
        sums = [product.sums for product in products]
        if batched:
            images = list(images[0])
            sums = list(sums[0])
        return images, [self.weighted(columns.T) for columns in sums]


class _Products:
    """Products of vectors with a slice (or with a batch of slices) that is read in blocks of rows.

    Attributes:
        images: T v, (out, columns).
        sums: (T^T T v)^T over the rows that were read, (columns, in).
    """

    def __init__(self, vectors: Tensor, out_features: int) -> None:
        self.vectors = vectors
        self.images = vectors.new_empty(*vectors.shape[:-2], out_features, vectors.shape[-1])
        self.sums = torch.zeros_like(vectors.mT, memory_format=torch.contiguous_format)

    def add(self, rows: slice, part: Tensor) -> None:
        """Take in a block of rows."""
        if self.vectors.shape[-1] == 0:
            return
        product = part @ self.vectors
        self.images[..., rows, :] = product
        self.sums += product.mT @ part
