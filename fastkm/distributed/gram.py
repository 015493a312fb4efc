"""The inner products of the rows of a memory and of its patterns, and a small memory that has the same.

A write needs of mean R and values Z only the inner products of their rows, ``G = Y Yᵀ`` with ``Y = [R; Z]``. Ranks that
hold different columns of Y sum their G. Any F with ``F Fᵀ = G`` is then, for the search of the weights, as good as Y: a
memory of K + T columns whose mean and values are the rows of F gets the same weights, covariance and variances.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCKS = 8  # of the rows in a symmetric product: (1 + 1/8)/2 of the operations of a full one

# Of a diagonal entry of G + λI to its pivot. Inner products in float32 round at eps times the former; what is solved
# with them is wrong by eps times this ratio. Random rows, twice as many columns as rows, have ratios of about 2.
CONDITION = 16


class Gram(torch.autograd.Function):
    """``G = Y Yᵀ [B, K + T, K + T]`` of ``Y = [R; Z]``, with no copy of Y."""

    @staticmethod
    def forward(ctx, mean: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(mean, values)
        (B, K, _), T = mean.shape, values.shape[1]
        gram = mean.new_empty(B, K + T, K + T)
        step = max(1, -(-K // BLOCKS))
        for first in range(0, K, step):
            last = min(K, first + step)
            gram[:, first:last, :last] = mean[:, first:last] @ mean[:, :last].mT
            gram[:, :first, first:last] = gram[:, first:last, :first].mT
        gram[:, K:, :K] = values @ mean.mT
        gram[:, :K, K:] = gram[:, K:, :K].mT
        inner = values @ values.mT
        gram[:, K:, K:] = (inner + inner.mT) / 2
        return gram

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        mean, values = ctx.saved_tensors
        K, both = mean.shape[1], grad + grad.mT
        to_mean = both[:, :K, :K] @ mean + both[:, :K, K:] @ values
        to_values = both[:, K:, :K] @ mean + both[:, K:, K:] @ values
        return to_mean, to_values


class SquareRoot(torch.autograd.Function):
    """F ``[B, n, r]`` with ``F Fᵀ = G``, in float64: a Cholesky factor, or, without full rank, from eigenvectors.

    Rows that nobody reads, ``unread [B, n]``, are zero in G; a diagonal entry each keeps them from lowering its rank.
    Returned with F: the pivots of G ``[B, n]``, zero without full rank.

    What follows from F alone through ``F Fᵀ`` does not change when F is rotated. Its cotangent is then
    ``F̄ = 2 S F`` with the symmetric cotangent S of G, and ``S = N + Nᵀ (I − P)`` with ``N = ½ F̄ F⁺`` and the projection
    ``P = F F⁺``. The derivative of a Cholesky factor is not needed; it would lose digits where G is nearly singular.
    """

    @staticmethod
    def forward(ctx, gram: Tensor, rank: int, unread: Tensor | None) -> tuple[Tensor, Tensor]:
        gram = gram.double()
        ctx.is_lower = rank >= gram.shape[-1]
        if ctx.is_lower:
            root, failed = torch.linalg.cholesky_ex(gram if unread is None else gram + _diagonal_of(gram, unread))
            ctx.is_lower = not failed.any()
        if not ctx.is_lower:
            values, vectors = torch.linalg.eigh(gram)
            kept = slice(gram.shape[-1] - rank, None)
            root = vectors[..., kept] * values[..., kept].clamp_min(0).sqrt().unsqueeze(-2)
        ctx.save_for_backward(root)
        pivots = root.diagonal(dim1=-2, dim2=-1).square() if ctx.is_lower else gram.new_zeros(gram.shape[:2])
        ctx.mark_non_differentiable(pivots)
        return root, pivots

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):
        (root,) = ctx.saved_tensors
        if ctx.is_lower:
            half = torch.linalg.solve_triangular(root, grad / 2, upper=False, left=False)
            return (half + half.mT) / 2, None, None
        lengths = root.square().sum(-2, keepdim=True)  # eigenvalues
        least = lengths.amax(-1, keepdim=True) * torch.finfo(root.dtype).eps * root.shape[-2]
        inverse = (root / lengths.where(lengths > least, torch.inf)).mT  # F⁺ [B, r, n]
        half = grad / 2 @ inverse
        return half + half.mT - half.mT @ (root @ inverse), None, None


def _diagonal_of(gram: Tensor, unread: Tensor) -> Tensor:
    largest = gram.diagonal(dim1=-2, dim2=-1).max(-1, keepdim=True).values
    return torch.diag_embed(unread * torch.where(largest > 0, largest, 1))


def holds_digits(gram: Tensor, pivots: Tensor, ridge: Tensor) -> bool:
    """Whether inner products in float32 are good enough: ``G + λI`` is not near to singular in any memory.

    Its pivots are at least λ more than the ``pivots`` of G.
    """
    ridge = ridge.detach().unsqueeze(-1)
    diagonal = gram.detach().diagonal(dim1=-2, dim2=-1)
    return bool((diagonal + ridge <= CONDITION * (pivots + ridge)).all())
