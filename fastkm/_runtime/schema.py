"""Every operator of the package on one page: its schema, and beside it the shapes it returns.

Each operator stands in two namespaces. The C++ and CUDA sources under ``csrc/`` implement ``fastkm``, and
``<family>/triton.py`` implements ``fastkm_triton``. The extension is loaded if it was built. Without it the operators
of ``fastkm`` exist but have no kernel, and ``unavailable`` says why.

``info [B]`` is an int32 status for each memory: 0, or one of the codes of :mod:`fastkm._runtime.status`. ``precision``
says how a GPU rounds the products with codes, as an index into ``PRECISIONS`` of :mod:`fastkm._runtime.options`. Solves
and factors are always float32 there. Beside a float32 memory ``queries`` may be bfloat16 or float16; on a GPU
``values`` and ``weights`` may, too.
"""

import atexit
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastkm._runtime.flops import count_flops_once_loaded
from fastkm._runtime.options import CODE_DTYPES
from fastkm._runtime.torch_private import has_kernel

# Operators that the extension must bring a CPU kernel for; filled by the definitions below.
OPERATORS: list[str] = []
DEFINED: list[str] = []  # all operators that compute
CHANGING: list[str] = []  # operators that change their arguments; they have a CPU kernel, and none for a GPU

# Every schema below, by the name of its operator.
SCHEMAS: dict[str, str] = {}

# When this module is imported a second time, the operators are there and keep what implements them. Torch forgets the
# operators of a library that is deleted, so the libraries are kept until the process ends.
_libraries: dict[str, torch.library.Library] = {}
if not hasattr(torch.ops.fastkm, "select_cpu_level"):
    _libraries = {namespace: torch.library.Library(namespace, "DEF") for namespace in ("fastkm", "fastkm_triton")}
    atexit.register(_libraries.clear)


def _operator(schema: str, *, on_cpu: bool = True, changes: bool = False) -> Callable[[Callable], None]:
    """Define an operator in both namespaces; the function below it makes its outputs without computing them.

    One that ``changes`` its arguments stands in ``fastkm`` alone.
    """
    name = _add_schema(schema)

    def register(make_outputs: Callable) -> None:
        def fake(*arguments):
            if len({x.device for x in arguments if isinstance(x, Tensor)}) > 1:
                raise RuntimeError("fastkm: the tensors are on different devices")  # as the kernels say it
            return make_outputs(*arguments)

        for namespace, library in _libraries.items():
            if changes and namespace != "fastkm":
                continue
            library.define(schema)
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        if changes:
            CHANGING.append(name)
            return
        DEFINED.append(name)
        if on_cpu:
            OPERATORS.append(name)

    return register


def _question(schema: str) -> None:
    """Define an operator without tensors, which asks the extension about itself."""
    _add_schema(schema)
    if _libraries:
        _libraries["fastkm"].define(schema)


def _add_schema(schema: str) -> str:
    name = schema.partition("(")[0]
    SCHEMAS[name] = schema
    return name


def _load_extension() -> str | None:
    """Load the compiled kernels; on failure return the reason in words."""
    path = Path(__file__).parents[1] / "_C.abi3.so"
    if not path.exists():
        return "the C++ extension was not built (FASTKM_NO_EXT=1 at install time)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the C++ extension does not load with torch {torch.__version__}: {error}"
    if wrong := _differing_operators():
        return f"the C++ extension is of another version, it differs in {', '.join(wrong)}"
    return None


def _differing_operators() -> list[str]:
    """Operators that have no kernel, or that the extension was built for with another schema."""
    missing = [name for name in (*OPERATORS, *CHANGING) if not has_kernel(f"fastkm::{name}", "CPU")]
    if missing or not has_kernel("fastkm::built_schemas", "CompositeExplicitAutograd"):
        return missing or ["what it can be asked"]
    built = {schema.partition("(")[0]: schema for schema in torch.ops.fastkm.built_schemas().splitlines()}
    return [name for name in (*built, *SCHEMAS) if built.get(name, SCHEMAS.get(name)) != SCHEMAS.get(name)]


def _empty_info(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[:1], dtype=torch.int32)


def _like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


def _weights_like(mean: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    return mean.new_empty((*queries.shape[:2], mean.shape[1])), _empty_info(mean)


def _values_like(mean: Tensor, queries: Tensor, values_type: int | None) -> Tensor:
    dtype = CODE_DTYPES[values_type] if values_type else mean.dtype
    return mean.new_empty(queries.shape, dtype=dtype)


@_operator(
    "update_posterior(Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var, Tensor? mask,"
    " int precision)"
    " -> (Tensor mean, Tensor cov, Tensor innovation_var, Tensor kl, Tensor log_evidence, Tensor info)"
)
def _(mean, cov, weights, values, noise_var, mask, precision):
    per_pattern = weights.shape[:2]
    return (
        mean.new_empty(mean.shape),
        cov.new_empty(cov.shape),
        mean.new_empty(per_pattern),
        mean.new_empty(per_pattern),
        mean.new_empty(mean.shape[:1]),
        _empty_info(mean),
    )


@_operator(
    "remove_patterns(Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var, Tensor? mask)"
    " -> (Tensor mean, Tensor cov, Tensor info)"
)
def _(mean, cov, weights, values, noise_var, mask):
    return *_like(mean, cov), _empty_info(mean)


# The old patterns have the noise `old_noise_var`; as many come as leave.
@_operator(
    "replace_patterns(Tensor mean, Tensor cov, Tensor old_weights, Tensor old_values, Tensor weights, Tensor values,"
    " Tensor noise_var, Tensor old_noise_var, Tensor? mask) -> (Tensor mean, Tensor cov, Tensor info)"
)
def _(mean, cov, old_weights, old_values, weights, values, noise_var, old_noise_var, mask):
    return *_like(mean, cov), _empty_info(mean)


@_operator(
    "update_square_root(Tensor mean, Tensor root, Tensor weights, Tensor values, Tensor noise_var, Tensor? mask)"
    " -> (Tensor mean, Tensor root, Tensor info)"
)
def _(mean, root, weights, values, noise_var, mask):
    return *_like(mean, root), _empty_info(mean)


@_operator(
    "filter_posterior(Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor queries, Tensor noise_var,"
    " Tensor? retention, Tensor prior_var, Tensor? forgetting, bool read_before, Tensor? mask, int precision)"
    " -> (Tensor mean, Tensor cov, Tensor values, Tensor variance, Tensor innovation_var, Tensor log_evidence,"
    " Tensor info)"
)
def _(mean, cov, weights, values, queries, noise_var, retention, prior_var, forgetting, read_before, mask, precision):
    per_step = weights.shape[:2]
    return (
        mean.new_empty(mean.shape),
        cov.new_empty(cov.shape),
        mean.new_empty((*per_step, mean.shape[2])),
        mean.new_empty(per_step),
        mean.new_empty(per_step),
        mean.new_empty(mean.shape[:1]),
        _empty_info(mean),
    )


@_operator(
    "solve_addressing(Tensor mean, Tensor queries, Tensor ridge, bool squared_gram) -> (Tensor weights, Tensor info)"
)
def _(mean, queries, ridge, squared_gram):
    return _weights_like(mean, queries)


# What addressing needs of a memory again and again; `gram` has no rows unless `squared_gram`.
@_operator(
    "factor_addressing(Tensor mean, Tensor ridge, bool squared_gram)"
    " -> (Tensor pseudoinverse, Tensor lower, Tensor gram, Tensor info)"
)
def _(mean, ridge, squared_gram):
    B, K, C = mean.shape
    gram_rows = K if squared_gram else 0
    return mean.new_empty(B, C, K), mean.new_empty(B, K, K), mean.new_empty(B, gram_rows, K), _empty_info(mean)


@_operator(
    "solve_factored(Tensor mean, Tensor queries, Tensor ridge, Tensor lower, Tensor pseudoinverse, Tensor gram)"
    " -> (Tensor weights, Tensor info)"
)
def _(mean, queries, ridge, lower, pseudoinverse, gram):
    return _weights_like(mean, queries)


@_operator(
    "write(Tensor mean, Tensor cov, Tensor values, Tensor noise_var, Tensor ridge, int num_opt_iters,"
    " bool squared_gram, Tensor? mask, int precision)"
    " -> (Tensor mean, Tensor cov, Tensor weights, Tensor innovation_var, Tensor kl, Tensor info)"
)
def _(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision):
    per_pattern = values.shape[:2]
    return (
        mean.new_empty(mean.shape),
        cov.new_empty(cov.shape),
        mean.new_empty((*per_pattern, mean.shape[1])),
        mean.new_empty(per_pattern),
        mean.new_empty(per_pattern),
        _empty_info(mean),
    )


# `values_type` is the dtype of the values: None for that of the memory, or an index into CODE_DTYPES of
# :mod:`fastkm._runtime.options`.
@_operator(
    "read(Tensor mean, Tensor queries, Tensor ridge, int num_iters, bool squared_gram, int precision,"
    " int? values_type=None) -> (Tensor values, Tensor weights, Tensor info)"
)
def _(mean, queries, ridge, num_iters, squared_gram, precision, values_type=None):
    return _values_like(mean, queries, values_type), *_weights_like(mean, queries)


@_operator(
    "read_factored(Tensor mean, Tensor queries, Tensor ridge, Tensor lower, Tensor pseudoinverse, Tensor gram,"
    " int num_iters, int precision, int? values_type=None) -> (Tensor values, Tensor weights, Tensor info)"
)
def _(mean, queries, ridge, lower, pseudoinverse, gram, num_iters, precision, values_type=None):
    return _values_like(mean, queries, values_type), *_weights_like(mean, queries)


@_operator("kl_memory(Tensor mean, Tensor cov, Tensor prior_mean, Tensor prior_cov) -> (Tensor kl, Tensor info)")
def _(mean, cov, prior_mean, prior_cov):
    return mean.new_empty(mean.shape[:1]), _empty_info(mean)


@_operator("logdet(Tensor cov) -> (Tensor logdet, Tensor info)")
def _(cov):
    return cov.new_empty(cov.shape[:1]), _empty_info(cov)


# ---- operators that change their arguments -------------------------------------------------------------------------


# update_posterior and write into a memory of the caller. `out_mean` may be `mean` and `out_cov` may be `cov`; otherwise
# they share no memory with an argument. A memory that is refused, as `info` says, comes out as it came in; of an update
# with more than 16 patterns, as it was before the first block of patterns that was refused.
@_operator(
    "update_posterior_into(Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var, Tensor? mask,"
    " int precision, Tensor(a!) out_mean, Tensor(b!) out_cov)"
    " -> (Tensor innovation_var, Tensor kl, Tensor log_evidence, Tensor info)",
    changes=True,
)
def _(mean, cov, weights, values, noise_var, mask, precision, out_mean, out_cov):
    per_pattern = weights.shape[:2]
    return (
        mean.new_empty(per_pattern),
        mean.new_empty(per_pattern),
        mean.new_empty(mean.shape[:1]),
        _empty_info(mean),
    )


@_operator(
    "write_into(Tensor mean, Tensor cov, Tensor values, Tensor noise_var, Tensor ridge, int num_opt_iters,"
    " bool squared_gram, Tensor? mask, int precision, Tensor(a!) out_mean, Tensor(b!) out_cov)"
    " -> (Tensor weights, Tensor innovation_var, Tensor kl, Tensor info)",
    changes=True,
)
def _(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision, out_mean, out_cov):
    per_pattern = values.shape[:2]
    return (
        mean.new_empty((*per_pattern, mean.shape[1])),
        mean.new_empty(per_pattern),
        mean.new_empty(per_pattern),
        _empty_info(mean),
    )


# Streams. Rows of `mean [B, K, ·]`, `cov [B, K, ·]` and `inverse [B, K, ·]` are padded with zeros to a multiple of 16
# numbers. `inverse` is (mean meanᵀ + ridge I)⁻¹ and follows the patterns.


# `weights` are those of the patterns; without, they are found, and returned. `info [B, T]` says which patterns were
# refused; these change nothing. How often `inverse` was computed anew is added to `refreshes [B]`, int64.
@_operator(
    "stream_patterns(Tensor(a!) mean, Tensor(b!) cov, Tensor(c!) inverse, Tensor(d!) refreshes, Tensor? weights,"
    " Tensor values, Tensor noise_var, Tensor ridge, int num_opt_iters, Tensor? mask)"
    " -> (Tensor weights, Tensor innovation_var, Tensor kl, Tensor log_evidence, Tensor info)",
    changes=True,
)
def _(mean, cov, inverse, refreshes, weights, values, noise_var, ridge, num_opt_iters, mask):
    per_pattern = values.shape[:2]
    found = (values.shape[0], 0 if weights is not None else values.shape[1], mean.shape[1])
    return (
        mean.new_empty(found),
        mean.new_empty(per_pattern),
        mean.new_empty(per_pattern),
        mean.new_empty(mean.shape[:1]),
        mean.new_empty(per_pattern, dtype=torch.int32),
    )


@_operator("refresh_streams(Tensor mean, Tensor(a!) inverse, Tensor ridge) -> Tensor info", changes=True)
def _(mean, inverse, ridge):
    return _empty_info(mean)


@_operator(
    "write_gram(Tensor gram, Tensor cov, Tensor noise_var, Tensor ridge, int columns, int num_opt_iters, Tensor? mask)"
    " -> (Tensor cov, Tensor weights, Tensor innovation_var, Tensor kl, Tensor pivots, Tensor info)"
)
def _(gram, cov, noise_var, ridge, columns, num_opt_iters, mask):
    (B, K, _), T = cov.shape, gram.shape[1] - cov.shape[1]
    return (
        cov.new_empty(cov.shape),
        cov.new_empty((B, T, K)),
        cov.new_empty((B, T)),
        cov.new_empty((B, T)),
        cov.new_empty((B, K + T)),
        _empty_info(cov),
    )


# ---- backward: cotangents of the outputs in, cotangents of the tensor inputs out, in the order of the inputs -------
# A cotangent that is None is zero. A backward computes again what else it needs.


@_operator(
    "update_posterior_backward(Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var, Tensor? mask,"
    " int precision,"
    " Tensor? grad_mean, Tensor? grad_cov, Tensor? grad_innovation_var, Tensor? grad_kl, Tensor? grad_log_evidence)"
    " -> (Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var)"
)
def _(mean, cov, weights, values, noise_var, mask, precision, *grads):
    return _like(mean, cov, weights, values, noise_var)


@_operator(
    "remove_patterns_backward(Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var, Tensor? mask,"
    " Tensor? grad_mean, Tensor? grad_cov)"
    " -> (Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor noise_var)"
)
def _(mean, cov, weights, values, noise_var, mask, *grads):
    return _like(mean, cov, weights, values, noise_var)


@_operator(
    "update_square_root_backward(Tensor mean, Tensor root, Tensor weights, Tensor values, Tensor noise_var,"
    " Tensor? mask, Tensor? grad_mean, Tensor? grad_root)"
    " -> (Tensor mean, Tensor root, Tensor weights, Tensor values, Tensor noise_var)"
)
def _(mean, root, weights, values, noise_var, mask, *grads):
    return _like(mean, root, weights, values, noise_var)


@_operator(
    "replace_patterns_backward(Tensor mean, Tensor cov, Tensor old_weights, Tensor old_values, Tensor weights,"
    " Tensor values, Tensor noise_var, Tensor old_noise_var, Tensor? mask, Tensor? grad_mean, Tensor? grad_cov)"
    " -> (Tensor mean, Tensor cov, Tensor old_weights, Tensor old_values, Tensor weights, Tensor values,"
    " Tensor noise_var, Tensor old_noise_var)"
)
def _(mean, cov, old_weights, old_values, weights, values, noise_var, old_noise_var, mask, *grads):
    return _like(mean, cov, old_weights, old_values, weights, values, noise_var, old_noise_var)


# What is not given gets an empty gradient.
@_operator(
    "filter_posterior_backward(Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor queries,"
    " Tensor noise_var, Tensor? retention, Tensor prior_var, Tensor? forgetting, bool read_before, Tensor? mask,"
    " int precision, Tensor? grad_mean, Tensor? grad_cov, Tensor? grad_values, Tensor? grad_variance,"
    " Tensor? grad_innovation_var, Tensor? grad_log_evidence)"
    " -> (Tensor mean, Tensor cov, Tensor weights, Tensor values, Tensor queries, Tensor noise_var, Tensor retention,"
    " Tensor prior_var, Tensor forgetting)"
)
def _(
    mean, cov, weights, values, queries, noise_var, retention, prior_var, forgetting, read_before, mask, precision, *_
):
    given = (x if x is not None else mean.new_empty(0) for x in (retention, prior_var, forgetting))
    return _like(mean, cov, weights, values, queries, noise_var, *given)


# `weights` are what the write returned.
@_operator(
    "write_backward(Tensor mean, Tensor cov, Tensor values, Tensor noise_var, Tensor ridge, int num_opt_iters,"
    " bool squared_gram, Tensor? mask, int precision, Tensor weights,"
    " Tensor? grad_mean, Tensor? grad_cov, Tensor? grad_weights, Tensor? grad_innovation_var, Tensor? grad_kl)"
    " -> (Tensor mean, Tensor cov, Tensor values, Tensor noise_var, Tensor ridge)"
)
def _(mean, cov, values, noise_var, ridge, num_opt_iters, squared_gram, mask, precision, weights, *grads):
    return _like(mean, cov, values, noise_var, ridge)


# Serves solve_addressing too: one iteration, no grad_values.
@_operator(
    "read_backward(Tensor mean, Tensor queries, Tensor ridge, int num_iters, bool squared_gram, int precision,"
    " Tensor? grad_values, Tensor? grad_weights) -> (Tensor mean, Tensor queries, Tensor ridge)"
)
def _(mean, queries, ridge, num_iters, squared_gram, precision, *grads):
    return _like(mean, queries, ridge)


# Serves solve_factored too: one iteration, no grad_values. It is the gradient of a read that factors anew.
@_operator(
    "read_factored_backward(Tensor mean, Tensor queries, Tensor ridge, Tensor lower, Tensor pseudoinverse, Tensor gram,"
    " int num_iters, int precision, Tensor? grad_values, Tensor? grad_weights)"
    " -> (Tensor mean, Tensor queries, Tensor ridge)"
)
def _(mean, queries, ridge, lower, pseudoinverse, gram, num_iters, precision, *grads):
    return _like(mean, queries, ridge)


@_operator(
    "kl_memory_backward(Tensor mean, Tensor cov, Tensor prior_mean, Tensor prior_cov, Tensor grad_kl)"
    " -> (Tensor mean, Tensor cov, Tensor prior_mean, Tensor prior_cov)"
)
def _(mean, cov, prior_mean, prior_cov, grad_kl):
    return _like(mean, cov, prior_mean, prior_cov)


@_operator("logdet_backward(Tensor cov, Tensor grad_logdet) -> Tensor")
def _(cov, grad_logdet):
    return cov.new_empty(cov.shape)


count_flops_once_loaded(DEFINED, ("fastkm", "fastkm_triton"))
count_flops_once_loaded(CHANGING, ("fastkm",))

# How the extension was built: one fact a line, a name, a colon, a value.
_question("build_facts() -> str")

# The schemas of this page when the extension was built, one a line.
_question("built_schemas() -> str")

# The i-th GPU architecture the CUDA kernels were compiled for, as compute capability × 10; 0 past the last.
_question("cuda_architecture(int i) -> int")

# Select the instruction set of the CPU kernels, and return it: 0 base, 1 AVX2, 2 AVX-512. It is the highest
# one not above `limit` that is built and that this processor runs.
_question("select_cpu_level(int limit) -> int")

unavailable: str | None = _load_extension()
# Whether the extension brings kernels for CUDA devices as well.
has_cuda = unavailable is None and has_kernel("fastkm::write", "CUDA")


def cuda_architectures() -> list[int]:
    """The compute capabilities × 10 the CUDA kernels were compiled for. Later devices compile the PTX of the last."""
    architectures: list[int] = []
    while has_cuda and (architecture := torch.ops.fastkm.cuda_architecture(len(architectures))):
        architectures.append(architecture)
    return architectures


def build_facts() -> dict[str, str]:
    """How the extension was built: by which compiler, with which instruction levels, for which torch."""
    if unavailable is not None:
        return {}
    lines = torch.ops.fastkm.build_facts().splitlines()
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}
