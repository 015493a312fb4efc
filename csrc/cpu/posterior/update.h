// Posterior update with given weights: the block form, a chunk of patterns at a time.
#pragma once

#include <limits>

#include "cpu/linalg/dense.h"

namespace fastkm::FASTKM_LEVEL {

// Patterns conditioned on at once. Products shrink with the chunk, passes over the state grow with the episode's
// number of chunks; small chunks also round less.
constexpr int64_t kChunk = 16;
static_assert(kChunk <= kBlock);

// A memory being computed, in working memory.
template <class T>
struct Memory {
  Matrix<T> mean;  // R [K, C]
  Matrix<T> cov;   // U [K, K], both triangles
};

// Not symmetric, by more than rounding explains; or not finite, which no positive definite matrix is.
template <class T>
Status symmetry(const Matrix<T>& m) {
  constexpr int64_t W = kLanes<T>;
  using Bits = LaneNumber<T>;
  // Squares below the diagonal against those across it, lane by lane; what is left one by one.
  const int64_t whole = m.rows / W * W;
  alignas(64) T across[W * W];
  decltype(lane_numbers<T>()) scales = {}, gaps = {};
  for (int64_t i = 0; i < whole; i += W)
    for (int64_t j = 0; j <= i; j += W) {
      transpose_square(across, W, m.row(j) + i, m.ld);
      for (int64_t row = 0; row < W; ++row) {
        const Vec<T> entry = load(m.row(i + row) + j);
        const auto size = magnitude<T>(entry), difference = magnitude<T>(entry - load(across + row * W));
        scales = size > scales ? size : scales;
        gaps = difference > gaps ? difference : gaps;
      }
    }
  Bits scale = 0, gap = 0;
  const auto compare = [&](Bits size, Bits difference) {
    scale = size > scale ? size : scale;
    gap = difference > gap ? difference : gap;
  };
  for (int64_t lane = 0; lane < W; ++lane) compare(scales[lane], gaps[lane]);
  for (int64_t i = whole; i < m.rows; ++i)
    for (int64_t j = 0; j <= i; ++j)
      compare(__builtin_bit_cast(Bits, std::abs(m.row(i)[j])),
              __builtin_bit_cast(Bits, std::abs(m.row(i)[j] - m.row(j)[i])));
  const T most = __builtin_bit_cast(T, gap);  // of what is not finite no difference is
  if (most - most != 0) return kNotPositiveDefinite;
  return most <= std::sqrt(std::numeric_limits<T>::epsilon()) * __builtin_bit_cast(T, scale) ? kGood : kAsymmetric;
}

// Bring a memory in, and say whether its covariance can be one.
template <class T>
Status load_memory(const Memory<T>& memory, const PosteriorArgs<T>& args, int64_t b) {
  load_matrix(memory.mean, args.mean, b);
  load_matrix(memory.cov, args.cov, b);
  return symmetry(memory.cov);
}

// Bring a chunk of patterns in, with zeros where the mask hides one: a hidden pattern may hold anything, even NaN.
template <class T>
void load_patterns(const Matrix<T>& to, const Batch<const T>& from, const PosteriorArgs<T>& args, int64_t b,
                   int64_t first) {
  load_matrix(to, from.from_row(first), b);
  for (int64_t t = 0; t < to.rows; ++t)
    if (!args.seen(b, first + t)) __builtin_memset(to.row(t), 0, static_cast<size_t>(to.columns) * sizeof(T));
}

// The same, only to be read: where nothing is hidden, the caller's own rows.
template <class T>
Matrix<T> patterns_of(const Batch<const T>& from, const PosteriorArgs<T>& args, int64_t b, int64_t first,
                      const Matrix<T>& work) {
  if (!args.mask.data) return rows_of(from.from_row(first), b, work);
  load_patterns(work, from, args, b, first);
  return work;
}

// One chunk of patterns against the memory before it, whitened by L, the factor of S = W U Wᵀ + diag(σ²).
template <class T>
struct Chunk {
  Matrix<T> gain;                  // G = L⁻¹ W U [t, K]
  Matrix<T> values;                // E = L⁻¹ (Z − W R) [t, C]
  T noise[kChunk], pivot[kChunk];  // σ² and L_tt² [t]
  bool good = true;                // S is what a positive definite U gives

  int64_t count() const { return gain.rows; }
};

template <class T>
Chunk<T> take_chunk(const PosteriorArgs<T>& args, int64_t count, Arena& arena) {
  return {.gain = take_matrix<T>(arena, count, args.K), .values = take_cleared<T>(arena, count, args.C)};
}

// How far below σ² rounding may bring a variance in a chunk of `count` patterns.
template <class T>
T slack_of(int64_t K, int64_t count, T variance) {
  return 4 * static_cast<T>(K + count) * std::numeric_limits<T>::epsilon() * std::abs(variance);
}

// From W U Wᵀ in the lower triangle of `factor` to L; tells σ² and L_tt², and whether U can be positive definite.
template <class T, size_t MOST>
bool factor_variances(const Factor<T>& factor, const PosteriorArgs<T>& args, int64_t b, int64_t first, T (&noise)[MOST],
                      T (&pivot)[MOST], Arena& arena) {
  const int64_t count = factor.size();
  T slack[MOST];
  for (int64_t t = 0; t < count; ++t) {
    noise[t] = *args.noise_var.at(b, first + t);
    T& variance = factor.lower.row(t)[t];
    variance += noise[t];
    slack[t] = slack_of(args.K, count, variance);
  }
  const bool good = cholesky(factor, arena, Floors<T>{noise, slack});
  for (int64_t t = 0; t < count; ++t) pivot[t] = factor.lower.row(t)[t] * factor.lower.row(t)[t];
  return good;
}

// E = L⁻¹ (Z − W R); a chunk has one block. Long sums are summed part by part, out of registers.
template <class T>
void whiten_values(const Chunk<T>& chunk, const Factor<T>& factor, const Matrix<T>& mean, const Matrix<T>& weights,
                   const Matrix<T>& values, Arena& arena, Upcoming* upcoming = nullptr) {
  if (mean.rows <= kSumRun) return solve(chunk.values, factor, values, mean.rows, left(weights), mean, upcoming);
  const bool consume = values.padded && mean.padded;
  const Matrix<T> innovations = consume ? values : take_cleared<T>(arena, values.rows, values.columns);
  product<Into::kSubtract>(innovations, values, mean.rows, left(weights), mean, upcoming);
  solve(chunk.values, factor, innovations, 0, {}, mean);
}

template <class T>
Chunk<T> whiten(const Memory<T>& memory, const Matrix<T>& weights, const Matrix<T>& values,
                const PosteriorArgs<T>& args, int64_t b, int64_t first, Arena& arena, Upcoming* upcoming = nullptr) {
  const int64_t K = args.K, count = weights.rows;
  Chunk<T> chunk = take_chunk(args, count, arena);
  const Matrix<T> projected = take_cleared<T>(arena, count, K), weights_transposed = take_matrix<T>(arena, K, count);
  const Factor<T> factor = take_factor<T>(arena, count);
  transpose(weights_transposed, weights);
  product<Into::kSet>(projected, K, left(weights), memory.cov, upcoming);
  product_lower<Into::kSet>(factor.lower, K, left(projected), weights_transposed);
  chunk.good = factor_variances(factor, args, b, first, chunk.noise, chunk.pivot, arena);
  solve(chunk.gain, factor, projected, 0, {}, projected);
  whiten_values(chunk, factor, memory.mean, weights, values, arena, upcoming);
  return chunk;
}

// R' = R + Gᵀ E, U' = U − Gᵀ G; `after` may be `before`.
template <class T>
void absorb(const Memory<T>& before, const Chunk<T>& chunk, const Memory<T>& after, Upcoming* upcoming) {
  product<Into::kAdd>(after.mean, before.mean, chunk.count(), transposed(chunk.gain), chunk.values, upcoming);
  product_lower<Into::kSubtract>(after.cov, before.cov, chunk.count(), transposed(chunk.gain), chunk.gain);
  mirror(after.cov);
}

// Condition on one chunk of patterns, from `first` on, and write what is known of each:
// KL_t = ½ [C (ln(s/σ²) − β) + β ‖E_t‖²] with β = 1 − σ²/s, and of ln p of the values −½ [C ln(2πs) + ‖E_t‖²].
template <class T>
Status condition(const Memory<T>& before, const Chunk<T>& chunk, const Memory<T>& after, const PosteriorArgs<T>& args,
                 int64_t b, int64_t first, double& log_evidence, Upcoming* upcoming = nullptr) {
  constexpr T kTwoPi = T(6.283185307179586476925286766559);
  absorb(before, chunk, after, upcoming);
  T energies[kChunk];
  squared_norms(chunk.values, energies);
  const T C = static_cast<T>(args.C);
  T level = 0, level_of = 0;  // ln(2πσ²), often the same for all
  for (int64_t t = 0; t < chunk.count(); ++t) {
    const bool seen = args.seen(b, first + t);
    const T noise = chunk.noise[t], pivot = chunk.pivot[t], s = seen && pivot > noise ? pivot : noise;
    const T energy = energies[t], growth = std::log(s / noise), beta = 1 - noise / s;
    if (noise != level_of) level = std::log(kTwoPi * noise), level_of = noise;
    *args.innovation_var.at(b, first + t) = s;
    *args.kl.at(b, first + t) = T(0.5) * (C * (growth - beta) + beta * energy);
    if (seen) log_evidence -= T(0.5) * (C * (growth + level) + energy);
  }
  return chunk.good ? kGood : kNotPositiveDefinite;
}

template <class T>
void store_memory(const Memory<T>& memory, const PosteriorArgs<T>& args, int64_t b) {
  store_matrix(args.new_mean, b, memory.mean);
  store_matrix(args.new_cov, b, memory.cov);
}

// What updating a memory touches. Small ones are there when they are needed; of large ones two do not fit the cache.
template <class T>
Upcoming upcoming_memory(const PosteriorArgs<T>& args, int64_t b, int64_t end) {
  constexpr int64_t kLeastBytes = 1 << 17, kMostBytes = 1 << 19;
  const int64_t K = args.K, C = args.C, patterns = args.T_;
  const int64_t rows = kChunk / FASTKM_TILE_ROWS, tiles = (2 * rows + K / FASTKM_TILE_ROWS) * strips<T>(C);
  Upcoming upcoming(1 + (patterns + kChunk - 1) / kChunk * (tiles + rows * strips<T>(K)));
  const int64_t bytes = (2 * K + patterns) * (K + C) * static_cast<int64_t>(sizeof(T));
  if (b == end || bytes < kLeastBytes || bytes > kMostBytes) return upcoming;
  upcoming.add(args.cov, b, 0, K, K);
  upcoming.add(args.weights, b, 0, patterns, K);
  upcoming.add(args.mean, b, 0, K, C);
  upcoming.add(args.values, b, 0, patterns, C);
  upcoming.add(args.new_cov, b, 0, K, K);
  upcoming.add(args.new_mean, b, 0, K, C);
  return upcoming;
}

// The memory is read where the caller has it and written where the caller wants it; in between it is in working memory.
template <class T>
void update_posterior(const PosteriorArgs<T>& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Memory<T> work{take_cleared<T>(arena, args.K, args.C), take_cleared<T>(arena, args.K, args.K)};
    const Memory<T> result{own_rows(args.new_mean, b, work.mean), own_rows(args.new_cov, b, work.cov)};
    Memory<T> memory{rows_of(args.mean, b, work.mean), rows_of(args.cov, b, work.cov)};
    const int64_t most = smaller(kChunk, args.T_);
    const Matrix<T> weights = take_matrix<T>(arena, most, args.K), values = take_matrix<T>(arena, most, args.C);
    Upcoming upcoming = upcoming_memory(args, b + 1, end);
    Status status = symmetry(memory.cov);
    double log_evidence = 0;  // a sum over all patterns
    const Arena::Mark chunk_start = arena.mark();
    for (int64_t first = 0; first < args.T_; first += kChunk) {
      arena.release(chunk_start);
      const int64_t count = smaller(kChunk, args.T_ - first);
      const Matrix<T> chunk_weights = patterns_of(args.weights, args, b, first, weights.rows_from(0, count));
      const Matrix<T> chunk_values = patterns_of(args.values, args, b, first, values.rows_from(0, count));
      const Chunk<T> chunk = whiten(memory, chunk_weights, chunk_values, args, b, first, arena, &upcoming);
      const Memory<T>& after = first + count < args.T_ ? work : result;
      const Status done = condition(memory, chunk, after, args, b, first, log_evidence, &upcoming);
      memory = after;
      if (status == kGood) status = done;
    }
    store_memory(memory, args, b);
    args.log_evidence[b] = static_cast<T>(log_evidence);
    args.info[b] = status;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
