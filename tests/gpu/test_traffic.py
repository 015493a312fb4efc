"""The bytes that Triton kernels ask for are counted, and those of an update are what its comment says."""

import pytest
import torch
from oracle import problem

K, C, T = 5, 40, 3
TILES = 2  # of C


@pytest.fixture(scope="module")
def counter(request):
    if request.config.getoption("--kernels") != "interpreter":
        pytest.skip("needs --kernels=interpreter")
    import fastkm.posterior.triton  # noqa: F401  registers the operator
    from gpu.traffic import Counter

    return Counter()


def test_an_update_reads_and_writes_the_state_once(counter):
    p = problem(1, T, 1, K, C, torch.float32)
    given = (*p.state, p.weights, p.values, p.noise_var)
    traffic = counter.of(lambda: torch.ops.fastkm_triton.update_posterior(*given, None, 0), given)
    # The covariance also from its other side, to see whether it is symmetric; weights again for every tile of C, and
    # the noise again for what is reported of each pattern.
    assert traffic.read == 4 * (K * C + 2 * K * K + (1 + TILES) * T * K + T * C + 2 * T)
    # Besides the state, for each pattern what the memory explains, the innovation variance and the divergence; evidence
    # and status.
    assert traffic.written == 4 * (K * C + K * K + 3 * T + 2)
    assert traffic.read_again == 4 * (TILES * T + 2 * T)  # innovation variances, and what the memory explains


def test_what_is_masked_is_not_counted(counter):
    from gpu.planted import double

    x, out = torch.ones(20), torch.empty(20)
    assert counter.of(lambda: [double[(2,)](x, out, 20, MASKED=True, BLOCK=16), out][1], [x]) == (80, 80, 0)
