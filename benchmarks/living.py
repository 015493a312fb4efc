"""A memory that lives: which form holds how many digits, how far it drifts, and what removal and roots cost on a CPU.

``python -m benchmarks.living digits`` prints the relative error of mean and covariance in float32 for every form of the
memory, with noise from 1 to 1e-12, for more and for fewer patterns than rows.

``python -m benchmarks.living drift`` writes, removes, replaces and merges patterns at random in float32, and prints at
every power of ten how far the memory is from float64's, which is computed from the patterns that are in there.

``python -m benchmarks.living time`` verifies and then times removal beside an update, and the update of a root beside a
QR factorisation in PyTorch. Of torch-kf and filterpy it times what is installed. The last rows are no updates: they are
parts that an update cannot leave out, so they bound how far it can be ahead of any other.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

import fastkm
from benchmarks.timing import keep_freed_memory, pin
from fastkm.cli.console import markdown_table
from fastkm.state import InformationState, MemoryState, SquareRootState
from fastkm.testing.presets import PRESETS
from fastkm.testing.timing import time_in_turn

NOISES = (1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-12)
Form = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]  # patterns and noise to mean and cov in float64


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max() / truth.abs().max())


# ---- digits ----------------------------------------------------------------------------------------------------------


def unit_prior(weights: Tensor, values: Tensor) -> MemoryState:
    (B, _, K), C = weights.shape, values.shape[2]
    return MemoryState(weights.new_zeros(B, K, C), torch.eye(K).to(weights).repeat(B, 1, 1))


def moment(backend: str) -> Form:
    def run(weights: Tensor, values: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        return fastkm.update_posterior(unit_prior(weights, values), weights, values, noise, backend=backend).state

    return run


def information(dtype: torch.dtype) -> Form:
    """In chunks of 16 patterns, each of which rounds the sums to ``dtype``."""

    def run(weights: Tensor, values: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        form = InformationState(*(x.to(dtype) for x in fastkm.to_information(unit_prior(weights, values))))
        for w, z in zip(weights.split(16, 1), values.split(16, 1), strict=True):
            form = fastkm.update_information(form, w, z, noise)
        return fastkm.from_information(form)

    return run


def square_root(weights: Tensor, values: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    root = fastkm.update_square_root(fastkm.to_square_root(unit_prior(weights, values)), weights, values, noise)
    return fastkm.from_square_root(SquareRootState(*(x.double() for x in root)))


FORMS: dict[str, Form] = {
    "moment, float32": moment("reference"),
    "moment, CPU kernel": moment("native"),
    "information, float64": information(torch.float64),
    "information, float32": information(torch.float32),
    "square root": square_root,
}


def digits(K: int, C: int) -> None:
    print(f"Error of R and of U in float32 against float64, relative to the largest entry; K {K}, C {C}, unit prior")
    for patterns in (512, K // 2):
        rows = []
        for noise in NOISES:
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(1, patterns, K, generator=generator) / K**0.5
            memory = torch.randn(1, K, C, generator=generator, dtype=torch.float64)
            noisy = noise**0.5 * torch.randn(1, patterns, C, generator=generator, dtype=torch.float64)
            values = (weights.double() @ memory + noisy).float()
            truth = square_root(weights.double(), values.double(), noise)
            rows.append((f"{noise:.0e}", *(digits_of(form, weights, values, noise, truth) for form in FORMS.values())))
        print(f"\nT = {patterns}\n\n{markdown_table(('σ²', *FORMS), rows)}")


def digits_of(form: Form, weights: Tensor, values: Tensor, noise: float, truth: tuple[Tensor, Tensor]) -> str:
    try:
        return ", ".join(f"{error(got, x):.0e}" for got, x in zip(form(weights, values, noise), truth, strict=True))
    except torch.linalg.LinAlgError:
        return "refused"


# ---- drift -----------------------------------------------------------------------------------------------------------


class Living:
    """A float32 memory and the patterns that are in there."""

    def __init__(self, K: int, C: int, noise: float) -> None:
        self.generator, self.noise = torch.Generator().manual_seed(0), noise
        self.K, self.C = K, C
        self.prior = MemoryState(self.draw(1, K, C), torch.eye(K).unsqueeze(0))
        self.state, self.held = self.prior, []
        self.refused = 0

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def pattern(self) -> tuple[Tensor, Tensor]:
        return self.draw(1, 1, self.K) / self.K**0.5, self.draw(1, 1, self.C)

    def pick(self) -> int:
        return int(torch.randint(len(self.held), (), generator=self.generator))

    def write(self) -> None:
        new = self.pattern()
        self.state = fastkm.update_posterior(self.state, *new, self.noise).state
        self.held.append(new)

    def remove(self) -> None:
        i = self.pick()
        self.state = fastkm.remove_patterns(self.state, *self.held[i], self.noise)
        self.held.pop(i)

    def replace(self) -> None:
        i, new = self.pick(), self.pattern()
        self.state = fastkm.replace_patterns(self.state, *self.held[i], *new, self.noise)
        self.held[i] = new

    def merge(self) -> None:
        """Two copies learn one pattern each, and become one memory."""
        new = [self.pattern(), self.pattern()]
        branches = [fastkm.update_posterior(self.state, *x, self.noise).state for x in new]
        self.state = fastkm.merge_memories(branches, self.state)
        self.held += new

    def step(self, most: int) -> None:
        """Any of the four, with between 1 and ``most`` patterns in the memory."""
        actions = [self.write, self.remove, self.replace, self.merge]
        if len(self.held) < 2:
            actions = [self.write, self.merge]
        elif len(self.held) >= most:
            actions = [self.remove, self.replace]
        try:
            actions[int(torch.randint(len(actions), (), generator=self.generator))]()
        except torch.linalg.LinAlgError:
            self.refused += 1

    def errors(self) -> tuple[float, float, float]:
        """Of R and of U, and the least eigenvalue of U as a share of what it is in float64."""
        weights, values = (torch.cat(x, 1).double() for x in zip(*self.held, strict=True))
        form = fastkm.to_information(MemoryState(*(x.double() for x in self.prior)))
        truth = fastkm.from_information(fastkm.update_information(form, weights, values, self.noise))
        least, want = (torch.linalg.eigvalsh(x.double()).min() for x in (self.state.cov, truth.cov))
        return error(self.state.mean, truth.mean), error(self.state.cov, truth.cov), float(least / want)


def drift(K: int, C: int, changes: int, noise: float) -> None:
    living, most = Living(K, C, noise), 4 * K
    print(f"K {K}, C {C}, σ² {noise}, float32, at most {most} patterns: error against float64 of the patterns in there")
    print(f"{'changes':>10} {'in there':>9} {'R':>10} {'U':>10}  {'least eigenvalue':>17}  refused")
    marks = {10**n for n in range(2, 10)} | {changes}
    for done in range(1, changes + 1):
        living.step(most)
        if done in marks:
            of_mean, of_cov, least = living.errors()
            print(
                f"{done:>10,} {len(living.held):>9} {of_mean:>10.2g} {of_cov:>10.2g}  {least:>17.6f}  {living.refused}",
                flush=True,
            )
            assert least > 0, "the covariance is indefinite"


# ---- time ------------------------------------------------------------------------------------------------------------


def qr_form(state: SquareRootState, weights: Tensor, values: Tensor, noise: float) -> SquareRootState:
    """``[[σ, 0], [(W S)ᵀ, Sᵀ]] = Q [[Lᵀ, G], [0, S'ᵀ]]`` by torch.linalg.qr."""
    (B, T, K), (mean, root) = weights.shape, state
    array = mean.new_zeros(B, T + K, T + K)
    array[:, :T, :T] = noise**0.5 * torch.eye(T)
    array[:, T:, :T], array[:, T:, T:] = (weights @ root).mT, root.mT
    upper = torch.linalg.qr(array, mode="r").R
    gain, lower = upper[:, :T, T:], upper[:, :T, :T].mT
    whitened = torch.linalg.solve_triangular(lower, values - weights @ mean, upper=False)
    return SquareRootState(mean + gain.mT @ whitened, upper[:, T:, T:].mT)


def torch_kf_update(state: MemoryState, weights: Tensor, values: Tensor, noise: float) -> MemoryState:
    from torch_kf import GaussianState, KalmanFilter

    (K, T), eye = (weights.shape[2], weights.shape[1]), torch.eye
    kalman = KalmanFilter(eye(K), weights, eye(K), noise * eye(T))
    new = kalman.update(GaussianState(*state), values)
    return MemoryState(new.mean, new.covariance)


def filterpy_update(state: SquareRootState, weights: Tensor, values: Tensor, noise: float) -> SquareRootState:
    from filterpy.kalman import SquareRootKalmanFilter

    new = []
    for mean, root, w, z in zip(*state, weights, values, strict=True):
        kalman = SquareRootKalmanFilter(dim_x=w.shape[1], dim_z=w.shape[0])
        kalman.x, kalman._P1_2, kalman.H = mean.numpy().copy(), root.numpy(), w.numpy()
        kalman.update(z.numpy(), noise**0.5)
        new.append([torch.as_tensor(x, dtype=torch.float32) for x in (kalman.x, kalman._P1_2)])
    return SquareRootState(*(torch.stack(x) for x in zip(*new, strict=True)))


def peers(state: MemoryState, root: SquareRootState, patterns: tuple) -> dict[str, Callable[[], tuple]]:
    made: dict[str, Callable[[], tuple]] = {}
    if find_spec("torch_kf"):
        made["torch-kf, update"] = lambda: torch_kf_update(state, *patterns)
    if find_spec("filterpy"):
        made["filterpy, square root"] = lambda: filterpy_update(root, *patterns)
    return made


def parts(state: MemoryState, weights: Tensor, values: Tensor, noise: float) -> dict[str, Callable[[], object]]:
    """The four large products of an update by PyTorch's library, and the memory moved once."""
    out = MemoryState(*(torch.empty_like(x) for x in state))

    def products() -> tuple[Tensor, Tensor]:
        projected = weights @ state.cov
        return projected.mT @ (weights @ state.mean), projected.mT @ projected

    return {
        "products in PyTorch": products,
        "copy of the memory": lambda: [to.copy_(x) for to, x in zip(out, state, strict=True)],
    }


def as_moments(result: tuple) -> tuple[Tensor, Tensor]:
    """Mean and covariance of what a candidate returned, in float64."""
    if isinstance(result, fastkm.PosteriorUpdate):
        result = result.state
    mean, other = (x.double() for x in result)
    return mean, other @ other.mT if isinstance(result, SquareRootState) else other


def time(name: str, batch: int, seconds: float, noise: float = 1.0) -> None:
    preset, generator = PRESETS[name], torch.Generator().manual_seed(0)
    K, C, T = preset.K, preset.C, preset.T
    prior = MemoryState(torch.randn(batch, K, C, generator=generator), torch.eye(K).repeat(batch, 1, 1))
    weights = torch.randn(batch, T, K, generator=generator) / K**0.5
    values = torch.randn(batch, T, C, generator=generator)
    patterns, root = (weights, values, noise), fastkm.to_square_root(prior)
    written = fastkm.update_posterior(prior, *patterns).state
    candidates: dict[str, Callable[[], tuple]] = {
        "update_posterior": lambda: fastkm.update_posterior(prior, *patterns),
        "remove_patterns": lambda: fastkm.remove_patterns(written, *patterns),
        "replace_patterns": lambda: fastkm.replace_patterns(written, weights, values, *patterns),
        "update_square_root": lambda: fastkm.update_square_root(root, *patterns),
        "QR in PyTorch": lambda: qr_form(root, *patterns),
        **peers(prior, root, patterns),
    }
    double = MemoryState(*(x.double() for x in prior))
    exact = fastkm.update_posterior(double, weights.double(), values.double(), noise).state
    for candidate, run in candidates.items():
        truth = double if candidate == "remove_patterns" else exact
        wrong = max(error(got, x) for got, x in zip(as_moments(run()), truth, strict=True))
        assert wrong < 1e-4, f"{candidate} is off by {wrong:.1g}"
    timings = time_in_turn({**candidates, **parts(prior, *patterns)}, seconds)
    once, roots = timings["update_posterior"].median, timings["update_square_root"].median
    rows = [
        (candidate, f"{t.median * 1e6:,.0f} µs", f"{t.median / once:.2f}", f"{t.median / roots:.1f}")
        for candidate, t in timings.items()
    ]
    print(f"\n{name}: B {batch}, K {K}, C {C}, T {T}, float32\n")
    print(markdown_table(("", "a call", "of update_posterior", "of update_square_root"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "drift", "time"])
    parser.add_argument("--rows", type=int, help="K (digits: 32, drift: 16)")
    parser.add_argument("--columns", type=int, default=20, help="C")
    parser.add_argument("--changes", type=int, default=10_000, help="of a drift")
    parser.add_argument("--noise-var", type=float, default=1.0, help="of a drift")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["M", "L", "LLM"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="for all calls of a preset")
    options = parser.parse_args()
    print(f"threads: {pin(options.threads)}; freed memory: {keep_freed_memory()}")
    if options.what == "digits":
        digits(options.rows or 32, options.columns)
    elif options.what == "drift":
        drift(options.rows or 16, options.columns, options.changes, options.noise_var)
    else:
        for name in options.presets:
            time(name, options.batch, options.seconds)


if __name__ == "__main__":
    main()
