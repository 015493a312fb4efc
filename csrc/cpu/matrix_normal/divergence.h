// Divergence of two memories and the log-determinant of a covariance, by Cholesky.
#pragma once

#include <cmath>

#include "cpu/linalg/cholesky.h"
#include "cpu/linalg/symmetric.h"

namespace fastkm::FASTKM_LEVEL {

// The lower triangle of a covariance, which is all that is read of it, and whether it can be one. Where its rows are
// contiguous the caller's own are compared and nothing else is copied.
template <class T>
Status load_lower(const Matrix<T>& to, const Batch<const T>& cov, int64_t b) {
  constexpr int64_t W = kLanes<T>;
  const int64_t n = to.rows;
  if (cov.stride[2] != 1) {
    load_matrix(to, cov, b);
    return symmetry(to);
  }
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = first + kBlock;  // a diagonal block takes part whole
    for (int64_t i = first; i < smaller(end, n); ++i) {
      const T* from = cov.at(b, i);
      const int64_t whole = end <= n ? end : n / W * W;
      for (int64_t j = 0; j < whole; j += W) store<T>(to.row(i) + j, load(from + j));
      for (int64_t j = whole; j < end; ++j) to.row(i)[j] = j < n ? from[j] : 0;
    }
  }
  return symmetry(Matrix<T>{const_cast<T*>(cov.at(b)), n, n, cov.stride[1]});
}

template <class T>
Status load_and_factor(const Factor<T>& factor, const Batch<const T>& cov, int64_t b, Arena& arena,
                       Inverses inverses = Inverses::kAll, Upcoming* upcoming = nullptr) {
  if (const Status status = load_lower(factor.lower, cov, b); status != kGood) return status;
  return cholesky(factor, arena, {}, upcoming, inverses) ? kGood : kNotPositiveDefinite;
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

// The squared norm of L⁻¹ X by columns, for a panel X of VECS vectors whose rows above `first` are zero; `rhs(i, j)` is
// the vector from column j of row i. A tile of rows is solved in registers and Y, the solution, is kept for the tiles
// below it.
template <int VECS, class T, class Rhs>
void add_squared_norm(double (&total)[kLanes<T>], const Factor<T>& f, int64_t first, const Rhs& rhs, T* y) {
  constexpr int64_t W = kLanes<T>, kWidth = VECS * W;
  constexpr int kRows = FASTKM_TILE_ROWS;
  const int64_t n = f.size();
  for (int64_t i = first / kRows * kRows; i < n; i += kRows) {
    const int64_t start = first / kRows * kRows, ld = f.lower.ld;
    const T* lower = f.lower.row(i);
    Tile<kRows, VECS, T> tile;
    tile.add_product(i - start, lower + start, ld, 1, y + start * kWidth, kWidth);
    tile.each([&](Vec<T>& sum, int64_t r, int64_t j)
                  __attribute__((always_inline)) { sum = rhs(smaller(i + r, n - 1), j) - sum; });
    // The inverse of a small diagonal block of L is that of the large one there.
    const int64_t within = i % kBlock;
    tile.multiply_lower(f.inverse_block(i - within).row(within) + within, kBlock);
    const int64_t count = smaller(kRows, n - i);
    Vec<T> sum = {};
    tile.each([&](Vec<T>& x, int64_t r, int64_t j) __attribute__((always_inline)) {
      store<T>(y + (i + r) * kWidth + j, x);
      sum += r < count ? x * x : Vec<T>{};
    });
    for (int64_t lane = 0; lane < W; ++lane) total[lane] += sum[lane];
  }
}

// ‖L⁻¹ X‖² for X [n, columns], a whole number of vectors wide, the rows of whose column j are zero above first(j);
// WIDEST vectors at a time, which share what is zero in the first.
template <int WIDEST, class T, class First, class Rhs>
double squared_norm_of_solution(const Factor<T>& f, int64_t columns, const First& first, const Rhs& rhs, Arena& arena) {
  constexpr int64_t W = kLanes<T>;
  double total[W] = {};
  T* y = arena.take<T>(round_up(f.size(), kBlock) * kTileVectors * W);
  const auto panel = [&]<int VECS>(int64_t j) {
    add_squared_norm<VECS>(total, f, first(j), [&](int64_t i, int64_t within) { return rhs(i, j + within); }, y);
  };
  int64_t j = 0;
  for (; WIDEST >= 3 && j + 3 * W <= columns; j += 3 * W) panel.template operator()<3>(j);
  for (; j + 2 * W <= columns; j += 2 * W) panel.template operator()<2>(j);
  if (j < columns) panel.template operator()<1>(j);
  double sum = 0;
  for (double lane : total) sum += lane;
  return sum;
}

// ‖L0⁻¹ L‖²: in the rows above its diagonal a column of L is zero, and so is its solution.
template <class T>
double squared_norm_of_solution(const Factor<T>& prior, const Matrix<T>& lower, Arena& arena) {
  const auto lane = lane_numbers<T>();
  const auto rhs = [&](int64_t i, int64_t j) {
    return lane <= static_cast<LaneNumber<T>>(i - j) ? load(lower.row(i) + j) : Vec<T>{};
  };
  return squared_norm_of_solution<2>(prior, round_up(lower.rows, kLanes<T>), [](int64_t j) { return j; }, rhs, arena);
}

// ‖L0⁻¹ (R − R0)‖²
template <class T>
double squared_norm_of_solution(const Factor<T>& prior, const Batch<const T>& mean, const Batch<const T>& prior_mean,
                                int64_t b, int64_t C, Arena& arena) {
  constexpr int64_t W = kLanes<T>;
  const int64_t K = prior.size(), whole = mean.stride[2] == 1 && prior_mean.stride[2] == 1 ? C / W * W : 0;
  const auto top = [](int64_t) { return 0; };
  const auto rhs = [&](int64_t i, int64_t j) { return load(mean.at(b, i, j)) - load(prior_mean.at(b, i, j)); };
  const double sum = squared_norm_of_solution<3>(prior, whole, top, rhs, arena);
  if (whole == C) return sum;
  if (whole > 0) {  // the last vector of a row, without the columns that were in the one before it
    const auto rest = [&](int64_t i, int64_t) {
      return lane_numbers<T>() >= static_cast<LaneNumber<T>>(W - (C - whole)) ? rhs(i, C - W) : Vec<T>{};
    };
    return sum + squared_norm_of_solution<1>(prior, W, top, rest, arena);
  }
  const Matrix<T> difference = take_matrix<T>(arena, K, C);
  for (int64_t i = 0; i < K; ++i) {
    for (int64_t j = 0; j < C; ++j) difference.row(i)[j] = *mean.at(b, i, j) - *prior_mean.at(b, i, j);
    for (int64_t j = C; j < difference.ld; ++j) difference.row(i)[j] = 0;
  }
  const auto row = [&](int64_t i, int64_t j) { return load(difference.row(i) + j); };
  return squared_norm_of_solution<3>(prior, round_up(C, W), top, row, arena);
}

// While the factors are computed: the means, and the covariances of the next. Small ones are there when they are
// needed.
template <class T>
Upcoming upcoming_memories(const MatrixNormalArgs<T>& args, int64_t b, int64_t end) {
  constexpr int64_t kLeastBytes = 1 << 18;
  const int64_t K = args.K, C = args.C, tiles = 2 * K * K / (kBlock * FASTKM_TILE_ROWS);
  Upcoming upcoming(1 + tiles);
  if (2 * K * (K + C) * static_cast<int64_t>(sizeof(T)) < kLeastBytes) return upcoming;
  upcoming.add(args.mean, b, 0, K, C);
  upcoming.add(args.prior_mean, b, 0, K, C);
  if (b + 1 == end) return upcoming;
  upcoming.add(args.cov, b + 1, 0, K, K);
  upcoming.add(args.prior_cov, b + 1, 0, K, K);
  return upcoming;
}

// ½ [C tr(U0⁻¹U) + tr(ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|)]; a trace is the squared norm of L0⁻¹L, or of L0⁻¹Δ.
template <class T>
void kl_memory(const MatrixNormalArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Factor<T> factor = take_factor<T>(arena, args.K), prior = take_factor<T>(arena, args.K);
    Upcoming upcoming = upcoming_memories(args, b, end);
    const Status loaded = load_and_factor(factor, args.cov, b, arena, Inverses::kAllButLast, &upcoming);
    const Status prior_loaded = load_and_factor(prior, args.prior_cov, b, arena, Inverses::kAll, &upcoming);
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
    args.info[b] = load_and_factor(factor, args.cov, b, arena, Inverses::kAllButLast);
    args.result[b] = static_cast<T>(log_det(factor));
  }
}

}  // namespace fastkm::FASTKM_LEVEL
