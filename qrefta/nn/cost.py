"""The cost of a training step of an adapted linear layer, and the cheaper way to add its update.

With T tokens and factors of width R, a step makes six low-rank matmuls. For a diagonal core:

    forward     h = x down^T                        2 T in R operations
                y += (h * core) up^T                2 T out R
                or W += (up * core) down            2 in out R
    backward    back = (g up) * core                2 T out R
                dx += back down                     2 T in R
                or W += (up * core) down            2 in out R
                dup = g^T (h * core)                2 T out R
                ddown = back^T x                    2 T in R

The update is added to the product with the weight, or merged into the dequantized weight before the
product. Merging is cheaper with more tokens than inputs (forward) or outputs (backward). Without
gradients of the factors, as in evaluation, merging also saves h, and is cheaper from in out / (in +
out) tokens on.

Operations and bytes change sides at the same number of tokens, so one comparison decides. It leaves
out bitsandbytes' fused kernels for few tokens on CUDA, which need no dequantized weight.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """The cost of a computation.

    Attributes:
        operations: floating-point multiplications and additions.
        moved_bytes: read and written, each operand of each product counted once.
    """

    operations: int
    moved_bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.operations + other.operations, self.moved_bytes + other.moved_bytes)


def merging_is_cheaper(tokens: int, contracted: int, produced: int, gradients: bool) -> bool:
    """Whether adding the update to the dequantized weight costs less than adding it to the product.

    Args:
        tokens: rows of the product.
        contracted, produced: features that go in and come out.
        gradients: whether gradients of the factors need the rank-wide product anyway.
    """
    saved_per_token = produced if gradients else produced + contracted
    return tokens * saved_per_token > contracted * produced


def step_cost(
    tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    value_bytes: int = 2,
    weight_bits: float = 4.5,
) -> Cost:
    """Forward and backward pass of one adapted linear layer whose input and factors take gradients.

    Args:
        tokens: T.
        in_features, out_features: of the weight.
        rank: R; 0 for the frozen linear layer alone.
        value_bytes: of an activation and of a dequantized weight.
        weight_bits: stored bits a weight; 4.5 is NF4 with a float32 scale for 64 weights.
    """

    def product(rows: int, inner: int, columns: int, accumulated: bool = False) -> Cost:
        """(rows x inner) times (inner x columns), added to an existing matrix if `accumulated`."""
        results = (2 if accumulated else 1) * rows * columns
        values = rows * inner + inner * columns + results
        return Cost(2 * rows * inner * columns, value_bytes * values)

    def added(contracted: int, produced: int) -> Cost:
        """The update, in the cheaper of the two ways."""
        if merging_is_cheaper(tokens, contracted, produced, gradients=True):
            return product(out_features, rank, in_features, accumulated=True)
        return product(tokens, rank, produced, accumulated=True)

    dequantizing = Cost(0, in_features * out_features * (weight_bits / 8 + value_bytes))
    costs = [
        dequantizing,
        product(tokens, in_features, out_features),
        dequantizing,
        product(tokens, out_features, in_features),
    ]
    if rank > 0:
        costs += [
            product(tokens, in_features, rank),
            added(in_features, out_features),
            product(tokens, out_features, rank),
            added(out_features, in_features),
            product(rank, tokens, out_features),
            product(rank, tokens, in_features),
        ]
    return sum(costs, Cost(0, 0))
