"""Every operator of the package on one page: schema, and beside it the shapes it returns.

The C++ sources under ``csrc/`` only implement what is declared here. The extension is loaded when it was built;
without it the operators exist but have no kernel, and ``unavailable`` says why.

``info [B]`` is an int32 status per memory: 0, or one of the codes of :mod:`fastkm._check`.
"""

from pathlib import Path

import torch
from torch import Tensor

library = torch.library.Library("fastkm", "DEF")


def _load_extension() -> str | None:
    """Load the compiled kernels; on failure return the reason in words."""
    path = Path(__file__).with_name("_C.abi3.so")
    if not path.exists():
        return "the C++ extension was not built (no compiler at install time, or FASTKM_NO_EXT=1)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the C++ extension does not load with torch {torch.__version__}: {error}"
    declared = (f"fastkm::{name}" for name in OPERATORS)
    missing = [name for name in declared if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")]
    return f"the C++ extension is of another version, it lacks {', '.join(missing)}" if missing else None


# What the extension must bring.
OPERATORS = (
    *("update_posterior", "write", "read", "solve_addressing", "kl_memory", "logdet"),
    *("update_posterior_backward", "write_backward", "read_backward", "kl_memory_backward", "logdet_backward"),
)


def _empty_info(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[:1], dtype=torch.int32)


library.define(
    "update_posterior(Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var, Tensor? mask)"
    " -> (Tensor mean, Tensor cov, Tensor innovation_var, Tensor kl, Tensor log_evidence, Tensor info)"
)


@torch.library.register_fake("fastkm::update_posterior")
def _(mean, cov, weights, values, noise_var, mask):
    per_pattern = weights.shape[:2]
    return (
        mean.new_empty(mean.shape),
        cov.new_empty(cov.shape),
        mean.new_empty(per_pattern),
        mean.new_empty(per_pattern),
        mean.new_empty(mean.shape[:1]),
        _empty_info(mean),
    )


library.define(
    "solve_addressing(Tensor mean, Tensor queries, Tensor ridge, bool squared_gram) -> (Tensor weights, Tensor info)"
)


@torch.library.register_fake("fastkm::solve_addressing")
def _(mean, queries, ridge, squared_gram):
    return queries.new_empty((*queries.shape[:2], mean.shape[1])), _empty_info(mean)


library.define(
    "write(Tensor mean, Tensor cov, Tensor values, Tensor noise_var, Tensor ridge, int num_opt_iters,"
    " bool squared_gram, Tensor? mask)"
    " -> (Tensor mean, Tensor cov, Tensor weights, Tensor innovation_var, Tensor kl, Tensor info)"
)


@torch.library.register_fake("fastkm::write")
def _(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask):
    per_pattern = values.shape[:2]
    return (
        mean.new_empty(mean.shape),
        cov.new_empty(cov.shape),
        mean.new_empty((*per_pattern, mean.shape[1])),
        mean.new_empty(per_pattern),
        mean.new_empty(per_pattern),
        _empty_info(mean),
    )


library.define(
    "read(Tensor mean, Tensor queries, Tensor ridge, int num_iters, bool squared_gram)"
    " -> (Tensor values, Tensor weights, Tensor info)"
)


@torch.library.register_fake("fastkm::read")
def _(mean, queries, ridge, num_iters, squared_gram):
    weights = queries.new_empty((*queries.shape[:2], mean.shape[1]))
    return queries.new_empty(queries.shape), weights, _empty_info(mean)


library.define("kl_memory(Tensor mean, Tensor cov, Tensor prior_mean, Tensor prior_cov) -> (Tensor kl, Tensor info)")


@torch.library.register_fake("fastkm::kl_memory")
def _(mean, cov, prior_mean, prior_cov):
    return mean.new_empty(mean.shape[:1]), _empty_info(mean)


library.define("logdet(Tensor cov) -> (Tensor logdet, Tensor info)")


@torch.library.register_fake("fastkm::logdet")
def _(cov):
    return cov.new_empty(cov.shape[:1]), _empty_info(cov)


# ---- backward: cotangents of the outputs in, cotangents of the tensor inputs out, in the order of the inputs -------
# A cotangent that is None is zero. Everything else a backward needs it computes again.


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


library.define(
    "update_posterior_backward(Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var, Tensor? mask,"
    " Tensor? grad_mean, Tensor? grad_cov, Tensor? grad_innovation_var, Tensor? grad_kl, Tensor? grad_log_evidence)"
    " -> (Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var)"
)


@torch.library.register_fake("fastkm::update_posterior_backward")
def _(mean, cov, weights, values, noise_var, mask, *grads):
    return _like(mean, cov, weights, values, noise_var)


# `weights` are those the write found.
library.define(
    "write_backward(Tensor mean, Tensor cov, Tensor values, Tensor noise_var, Tensor ridge, int num_opt_iters,"
    " bool squared_gram, Tensor? mask, Tensor weights,"
    " Tensor? grad_mean, Tensor? grad_cov, Tensor? grad_weights, Tensor? grad_innovation_var, Tensor? grad_kl)"
    " -> (Tensor mean, Tensor cov, Tensor values, Tensor noise_var, Tensor ridge)"
)


@torch.library.register_fake("fastkm::write_backward")
def _(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, weights, *grads):
    return _like(mean, cov, values, noise_var, ridge)


# Serves solve_addressing too: one iteration, no grad_values.
library.define(
    "read_backward(Tensor mean, Tensor queries, Tensor ridge, int num_iters, bool squared_gram,"
    " Tensor? grad_values, Tensor? grad_weights) -> (Tensor mean, Tensor queries, Tensor ridge)"
)


@torch.library.register_fake("fastkm::read_backward")
def _(mean, queries, ridge, num_iters, squared_gram, *grads):
    return _like(mean, queries, ridge)


library.define(
    "kl_memory_backward(Tensor mean, Tensor cov, Tensor prior_mean, Tensor prior_cov, Tensor grad_kl)"
    " -> (Tensor mean, Tensor cov, Tensor prior_mean, Tensor prior_cov)"
)


@torch.library.register_fake("fastkm::kl_memory_backward")
def _(mean, cov, prior_mean, prior_cov, grad_kl):
    return _like(mean, cov, prior_mean, prior_cov)


library.define("logdet_backward(Tensor cov, Tensor grad_logdet) -> Tensor")


@torch.library.register_fake("fastkm::logdet_backward")
def _(cov, grad_logdet):
    return cov.new_empty(cov.shape)


# The instruction set the CPU kernels run with: 0 base, 1 AVX2, 2 AVX-512. `select_cpu_level` takes the highest one
# that is both built and run by this processor and not above `limit`, and returns it.
library.define("select_cpu_level(int limit) -> int")

unavailable: str | None = _load_extension()
