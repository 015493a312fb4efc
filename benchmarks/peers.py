"""Other people's packages, where one does the job or stands for another way to do it.

A peer that computes the same thing is verified like any other candidate. One that computes something else (a softmax
in place of the ridge solve, the nearest stored code) only shows what that costs: nothing is said to be faster than it.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.forms import Form
from fastkm.testing.definitions import Result
from fastkm.testing.episodes import Episode
from fastkm.testing.operations import Case

LARGEST_DENSE = 3200  # KC of the largest dense covariance: 3,200² numbers are 41 MB a memory
MOST_DENSE = 2  # memories


class Unsuitable(Exception):
    """A peer that cannot be run here or on this shape, and why."""


class Peer(NamedTuple):
    make: Callable[[Episode], Form]  # raises Unsuitable
    same_job: bool = True


def package(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise Unsuitable(f"{module.partition('.')[0]} does not import ({error}); pip install '.[peers]'") from error


def torch_kf(e: Episode) -> Form:
    """torch-kf's update with all patterns as one measurement; its mean may have C columns."""
    kf = package("torch_kf")

    def run(e: Episode) -> Result:
        noise = torch.diag_embed(e.noise_var)
        nothing = torch.empty(0, dtype=noise.dtype)  # memories do not move between updates
        state = kf.KalmanFilter(nothing, e.weights, nothing, noise).update(kf.GaussianState(*e.prior), e.values)
        return {"mean": state.mean, "cov": state.covariance}

    return run


def linear_operator_kl(e: Episode) -> Form:
    """With V = I the Kronecker product needs no more than its row factor: one factorisation of U0 for both traces."""
    operators = package("linear_operator.operators")

    def run(e: Episode) -> Result:
        (mean, cov), (prior_mean, prior_cov) = e.written, e.prior
        rows, columns = mean.shape[1:]
        posterior, prior = operators.DenseLinearOperator(cov), operators.DenseLinearOperator(prior_cov)
        root = posterior.cholesky().to_dense()
        right = torch.cat((columns**0.5 * root, mean - prior_mean), -1)
        traces, prior_logdet = prior.inv_quad_logdet(inv_quad_rhs=right, logdet=True)
        return {"value": 0.5 * (traces + columns * (prior_logdet - posterior.logdet() - rows))}

    return run


def linear_operator_kronecker_kl(e: Episode) -> Form:
    """The KC × KC covariance as a KroneckerProductLinearOperator: its solve, its quadratic form, its log-det."""
    operators = package("linear_operator.operators")

    def kronecker(cov, columns):
        one = operators.DiagLinearOperator(cov.new_ones(len(cov), columns))
        return operators.KroneckerProductLinearOperator(operators.DenseLinearOperator(cov), one)

    def run(e: Episode) -> Result:
        (mean, cov), (prior_mean, prior_cov) = e.written, e.prior
        rows, columns = mean.shape[1:]
        posterior, prior = kronecker(cov, columns), kronecker(prior_cov, columns)
        delta = (mean - prior_mean).flatten(1).unsqueeze(-1)
        shift, prior_logdet = prior.inv_quad_logdet(inv_quad_rhs=delta, logdet=True)
        spread = prior.linear_ops[0].solve(cov).diagonal(dim1=-2, dim2=-1).sum(-1)
        return {"value": 0.5 * (columns * (spread - rows) + shift + prior_logdet - posterior.logdet())}

    return run


def linear_operator_logdet(e: Episode) -> Form:
    operators = package("linear_operator.operators")
    return lambda e: {"value": operators.DenseLinearOperator(e.written.cov).logdet()}


def multivariate_normal_kl(e: Episode) -> Form:
    """torch.distributions.MultivariateNormal with the dense KC × KC covariance."""
    batch, rows, columns = e.prior.mean.shape
    if rows * columns > LARGEST_DENSE or batch > MOST_DENSE:
        raise Unsuitable(
            f"B = {batch} dense covariances of {rows * columns:,} × {rows * columns:,} numbers are too large"
        )

    def dense(state):
        one = torch.eye(columns, dtype=state.cov.dtype)
        cov = torch.stack([torch.kron(cov, one) for cov in state.cov])
        return torch.distributions.MultivariateNormal(state.mean.flatten(1), cov, validate_args=False)

    return lambda e: {"value": torch.distributions.kl_divergence(dense(e.written), dense(e.prior))}


def hopfield_read(e: Episode) -> Form:
    """Modern Hopfield read: one softmax over the stored patterns, by torch's fused attention."""
    return lambda e: {"values": scaled_dot_product_attention(e.queries, e.values, e.values)}


def nearest_code(e: Episode) -> Form:
    """The nearest stored code by faiss's flat index, one index a memory, built before it is timed."""
    faiss = package("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    if e.values.dtype != torch.float32:
        raise Unsuitable("faiss computes in float32 only")
    indices = []
    for codes in e.values.numpy():
        indices.append(faiss.IndexFlatL2(codes.shape[-1]))
        indices[-1].add(codes)
    queries = e.queries.numpy()

    def run(e: Episode) -> Result:
        found = [
            torch.from_numpy(index.search(asked, 1)[1][:, 0]) for index, asked in zip(indices, queries, strict=True)
        ]
        return {"values": torch.stack([codes[i] for codes, i in zip(e.values, found, strict=True)])}

    return run


PEERS: dict[Case, dict[str, Peer]] = {
    Case("update_posterior"): {"torch-kf, state only": Peer(torch_kf)},
    Case("read"): {
        "Hopfield read, by attention": Peer(hopfield_read, same_job=False),
        "nearest code, by faiss": Peer(nearest_code, same_job=False),
    },
    Case("kl_memory"): {
        "linear_operator": Peer(linear_operator_kl),
        "linear_operator, Kronecker": Peer(linear_operator_kronecker_kl),
        "MultivariateNormal, dense": Peer(multivariate_normal_kl),
    },
    Case("logdet"): {"linear_operator": Peer(linear_operator_logdet)},
}
