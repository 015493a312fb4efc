"""Triton kernels of remove_patterns and replace_patterns: those of an update, for −U in the place of U.

A removal takes the block form of an update whatever the size of its memory, because what a chunk leaves of the noise of
each pattern is read from the inverse of its factor. A replacement is an update and a removal, one after the other.
"""

import torch
from torch import Tensor

from fastkm._linalg.triton.condition import launch_apply
from fastkm._linalg.triton.condition_backward import Cotangents, launch_backward, update_backward
from fastkm._linalg.triton.launch import implements, mask_vectors, matrices, vectors, warps
from fastkm._linalg.triton.patterns import Patterns
from fastkm._runtime.autograd import differentiable
from fastkm._runtime.options import PRECISION_CODES
from fastkm.posterior.triton import factor_kernel, update_posterior_launcher

IEEE = PRECISION_CODES["ieee"]


@implements("remove_patterns")
def remove_launcher(
    mean: Tensor, cov: Tensor, weights: Tensor, values: Tensor, noise_var: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (B, K, _), T = mean.shape, weights.shape[1]
    new_mean, new_cov = mean.new_empty(mean.shape), mean.new_empty(cov.shape)
    info = mean.new_empty(B, dtype=torch.int32)
    if not B:
        return new_mean, new_cov, info
    patterns = Patterns(matrices(weights), matrices(values), vectors(noise_var), mask_vectors(mask))
    s, gain = mean.new_empty(B, T), mean.new_empty(B, T, K)
    factor_kernel[(B,)](matrices(cov), patterns, new_cov, s, None, info, gain, K, T, REMOVES=True, **warps(4))
    launch_apply(mean, patterns, new_mean, s, None, None, gain, IEEE)
    return new_mean, new_cov, info


@implements("remove_patterns_backward")
def remove_backward(
    mean: Tensor, cov: Tensor, weights: Tensor, values: Tensor, noise_var: Tensor, mask: Tensor | None,
    grad_mean: Tensor | None, grad_cov: Tensor | None,
):  # fmt: skip
    patterns = Patterns(matrices(weights), matrices(values), vectors(noise_var), mask_vectors(mask))
    grads = Cotangents(matrices(grad_mean), matrices(grad_cov), None, None, None)
    return tuple(launch_backward(mean, cov, patterns, grads, IEEE, removes=True))


@implements("replace_patterns")
def replace_launcher(
    mean: Tensor, cov: Tensor, old_weights: Tensor, old_values: Tensor, weights: Tensor, values: Tensor,
    noise_var: Tensor, old_noise_var: Tensor, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    mean, cov, *_, info = update_posterior_launcher(mean, cov, weights, values, noise_var, mask, IEEE)
    mean, cov, removed = remove_launcher(mean, cov, old_weights, old_values, old_noise_var, mask)
    return mean, cov, torch.where(info != 0, info, removed)


@implements("replace_patterns_backward")
def replace_backward(
    mean: Tensor, cov: Tensor, old_weights: Tensor, old_values: Tensor, weights: Tensor, values: Tensor,
    noise_var: Tensor, old_noise_var: Tensor, mask: Tensor | None, grad_mean: Tensor | None, grad_cov: Tensor | None,
):  # fmt: skip
    """Through the memory between the update and the removal, which is computed again."""
    between = update_posterior_launcher(mean, cov, weights, values, noise_var, mask, IEEE)[:2]
    *to_memory, to_old_weights, to_old_values, to_old_noise = remove_backward(
        *between, old_weights, old_values, old_noise_var, mask, grad_mean, grad_cov
    )
    to_mean, to_cov, to_weights, to_values, to_noise = update_backward(
        mean, cov, weights, values, noise_var, mask, IEEE, *to_memory, None, None, None
    )
    return to_mean, to_cov, to_old_weights, to_old_values, to_weights, to_values, to_noise, to_old_noise


_operators = torch.ops.fastkm_triton
remove_patterns = differentiable(_operators.remove_patterns.default, _operators.remove_patterns_backward.default)
replace_patterns = differentiable(_operators.replace_patterns.default, _operators.replace_patterns_backward.default)
