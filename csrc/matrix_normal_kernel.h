// Divergence of two memories and the log-determinant of a covariance, by Cholesky.
#pragma once

#include "posterior_kernel.h"

namespace fastkm::FASTKM_LEVEL {

template <class T>
Status load_and_factor(const Factor<T>& factor, const Batch<const T>& cov, int64_t b, Arena& arena) {
  load_matrix(factor.lower, cov, b);
  if (const Status status = symmetry(factor.lower); status != kGood) return status;
  return cholesky(factor, arena) ? kGood : kNotPositiveDefinite;
}

// Sums over a whole matrix are taken in double: what is wanted is their small difference. A double also holds the
// product of eight floats, which have one logarithm between them.
template <class T>
double log_det(const Factor<T>& factor) {
  constexpr int64_t kTogether = sizeof(T) < sizeof(double) ? 8 : 1;
  double sum = 0;
  for (int64_t first = 0; first < factor.size(); first += kTogether) {
    double product = 1;
    for (int64_t i = first; i < smaller(first + kTogether, factor.size()); ++i) product *= factor.lower.row(i)[i];
    sum += std::log(product);
  }
  return 2 * sum;
}

// Of a matrix whose padding is zero: in double over blocks of rows, lane by lane.
template <class T>
double squared_norm(const Matrix<T>& m) {
  constexpr int64_t W = kLanes<T>;
  double total[W] = {};
  for (int64_t first = 0; first < m.rows; first += kBlock) {
    Vec<T> sum = {};
    for (int64_t i = first; i < smaller(first + kBlock, m.rows); ++i)
      for (int64_t j = 0; j < m.columns; j += W) sum += load(m.row(i) + j) * load(m.row(i) + j);
    for (int64_t lane = 0; lane < W; ++lane) total[lane] += sum[lane];
  }
  double all = 0;
  for (double lane : total) all += lane;
  return all;
}

// Columns [first, first + to.columns) of R − R0, with the padding set to zero.
template <class T>
void load_difference(const Matrix<T>& to, const Batch<const T>& mean, const Batch<const T>& prior_mean, int64_t b,
                     int64_t first) {
  constexpr int64_t W = kLanes<T>;
  const int64_t step = mean.stride[2], prior_step = prior_mean.stride[2];
  const int64_t whole = step == 1 && prior_step == 1 ? to.columns / W * W : 0;
  for (int64_t i = 0; i < to.rows; ++i) {
    const T *x = mean.at(b, i, first), *y = prior_mean.at(b, i, first);
    T* row = to.row(i);
    for (int64_t j = 0; j < whole; j += W) store<T>(row + j, load(x + j) - load(y + j));
    for (int64_t j = whole; j < to.columns; ++j) row[j] = x[j * step] - y[j * prior_step];
    for (int64_t j = to.columns; j < to.ld; ++j) row[j] = 0;
  }
}

// Columns of a right-hand side solved at once: few enough to stay in the first-level cache with what they meet.
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T> > kBlock ? 2 * kLanes<T> : kBlock;

// ‖L0⁻¹ L‖², by columns: in the rows above its diagonal block a column of L is zero, and so is its solution.
template <class T>
double squared_norm_of_solution(const Factor<T>& prior, const Matrix<T>& lower, Arena& arena) {
  const int64_t K = lower.rows;
  double sum = 0;
  const Arena::Mark start = arena.mark();
  for (int64_t c = 0; c < K; c += kPanel<T>) {
    arena.release(start);
    const Matrix<T> panel = take_matrix<T>(arena, K - c, smaller(kPanel<T>, K - c));
    const Matrix<T> solution = take_matrix<T>(arena, panel.rows, panel.columns);
    copy_rows(panel, lower.block(c, K - c, c, panel.columns));
    for (int64_t i = 0; i < panel.columns; ++i)
      for (int64_t j = i + 1; j < panel.ld; ++j) panel.row(i)[j] = 0;
    solve_lower(prior.from(c), panel, solution);
    sum += squared_norm(solution);
  }
  return sum;
}

// ‖L0⁻¹ (R − R0)‖²
template <class T>
double squared_norm_of_solution(const Factor<T>& prior, const Batch<const T>& mean, const Batch<const T>& prior_mean,
                                int64_t b, int64_t C, Arena& arena) {
  const int64_t K = prior.size();
  double sum = 0;
  const Arena::Mark start = arena.mark();
  for (int64_t c = 0; c < C; c += kPanel<T>) {
    arena.release(start);
    const Matrix<T> panel = take_matrix<T>(arena, K, smaller(kPanel<T>, C - c));
    const Matrix<T> solution = take_matrix<T>(arena, panel.rows, panel.columns);
    load_difference(panel, mean, prior_mean, b, c);
    solve_lower(prior, panel, solution);
    sum += squared_norm(solution);
  }
  return sum;
}

// ½ [C tr(U0⁻¹U) + tr(ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|)]; a trace is the squared norm of L0⁻¹L, or of L0⁻¹Δ.
template <class T>
void kl_memory(const MatrixNormalArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Factor<T> factor = take_factor<T>(arena, args.K), prior = take_factor<T>(arena, args.K);
    const Status loaded = load_and_factor(factor, args.cov, b, arena);
    const Status prior_loaded = load_and_factor(prior, args.prior_cov, b, arena);
    args.info[b] = loaded > prior_loaded ? loaded : prior_loaded;
    if (args.info[b] != kGood) continue;

    const double growth = log_det(prior) - log_det(factor);
    const double spread = squared_norm_of_solution(prior, factor.lower, arena);
    const double shift = squared_norm_of_solution(prior, args.mean, args.prior_mean, b, args.C, arena);
    const double columns = static_cast<double>(args.C), rows = static_cast<double>(args.K);
    args.result[b] = static_cast<T>(0.5 * (columns * (spread - rows + growth) + shift));
  }
}

template <class T>
void logdet(const MatrixNormalArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Factor<T> factor = take_factor<T>(arena, args.K);
    args.info[b] = load_and_factor(factor, args.cov, b, arena);
    args.result[b] = static_cast<T>(log_det(factor));
  }
}

}  // namespace fastkm::FASTKM_LEVEL
