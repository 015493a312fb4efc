// Backward of the posterior update: the block form differentiated, chunk by chunk from the last to the first.
#pragma once

#include "cpu/posterior/update.h"

namespace fastkm::FASTKM_LEVEL {

// The backward of an update goes over the state so often that it takes more at once.
constexpr int64_t kBackwardChunk = 32;
constexpr int64_t kLargestChunk = kBackwardChunk > kChunk ? kBackwardChunk : kChunk;

// a ← (a + aᵀ) / 2, squares of whole vectors at a time; what is left one by one.
template <class T>
void symmetrise(const Matrix<T>& a) {
  constexpr int64_t W = kLanes<T>;
  const int64_t whole = a.rows / W * W;
  alignas(64) T across[W * W], along[W * W];
  for (int64_t i = 0; i < whole; i += W)
    for (int64_t j = 0; j <= i; j += W) {
      transpose_square(across, W, a.row(j) + i, a.ld);
      for (int64_t row = 0; row < W; ++row) {
        const Vec<T> mean = T(0.5) * (load(a.row(i + row) + j) + load(across + row * W));
        store<T>(along + row * W, mean);
        store<T>(a.row(i + row) + j, mean);
      }
      transpose_square(a.row(j) + i, a.ld, along, W);
    }
  for (int64_t i = whole; i < a.rows; ++i)
    for (int64_t j = 0; j < i; ++j) a.row(i)[j] = a.row(j)[i] = T(0.5) * (a.row(i)[j] + a.row(j)[i]);
}

// to += from, padding included.
template <class T>
void add_rows(const Matrix<T>& to, const Matrix<T>& from) {
  const int64_t padded = round_up(from.columns, kLanes<T>);
  for (int64_t i = 0; i < from.rows; ++i)
    for (int64_t j = 0; j < padded; j += kLanes<T>)
      store<T>(to.row(i) + j, load(to.row(i) + j) + load(from.row(i) + j));
}

template <class T>
Matrix<T> take_transposed(const Matrix<T>& m, Arena& arena) {
  const Matrix<T> result = take_matrix<T>(arena, m.columns, m.rows);
  transpose(result, m);
  return result;
}

// L⁻¹ in full, zero above the diagonal.
template <class T>
void invert_lower(const Factor<T>& f, const Matrix<T>& inverse, Arena& arena) {
  const int64_t n = f.size();
  const Matrix<T> work = take_matrix<T>(arena, kBlock, n);
  fill_zero(inverse);
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    copy_rows(inverse.block(j, width, j, width), f.inverse_block(j).block(0, width, 0, width));
    if (j == 0) continue;
    product<Into::kSet>(work.block(0, width, 0, j), j, left(f.lower.rows_from(j, width)), inverse);
    const Matrix<T> before = inverse.block(j, width, 0, j);
    product<Into::kSubtract>(before, width, left(f.inverse_block(j)), work);
  }
}

// Rows of C = A B for a triangular B [n, n], two vectors of columns from `first` on: of the rows of B that they share,
// then of those in which only one of them is not zero.
template <bool UPPER, int ROWS, class T>
[[gnu::always_inline]] inline void triangle_tile(int64_t n, int64_t first, const T* a, int64_t a_row,
                                                 const Matrix<T>& b, T* c, int64_t c_row) {
  constexpr int64_t W = kLanes<T>;
  const int64_t corner = smaller(first + W, n), end = smaller(first + 2 * W, n);
  Vec<T> sum[ROWS][2] = {};
  for (int64_t p = UPPER ? 0 : corner; p < (UPPER ? corner : n); ++p) {
    const Vec<T> near = load(b.row(p) + first), far = load(b.row(p) + first + W);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const T factor = a[i * a_row + p];
      sum[i][0] += factor * near;
      sum[i][1] += factor * far;
    }
  }
  for (int64_t p = UPPER ? corner : first; p < (UPPER ? end : corner); ++p) {
    const Vec<T> only = load(b.row(p) + first + (UPPER ? W : 0));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) sum[i][UPPER] += a[i * a_row + p] * only;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    store<T>(c + i * c_row + first, sum[i][0]);
    store<T>(c + i * c_row + first + W, sum[i][1]);
  }
}

// C = A B for a triangular B.
template <bool UPPER, class T>
void product_of_triangle(const Matrix<T>& c, const Matrix<T>& a, const Matrix<T>& b) {
  constexpr int64_t W = kLanes<T>;
  const int64_t n = b.rows;
  int64_t first = 0;
  for (; first + W < n; first += 2 * W) {
    int64_t i = 0;
    for (; i + kNarrowTileRows <= c.rows; i += kNarrowTileRows)
      triangle_tile<UPPER, kNarrowTileRows>(n, first, a.row(i), a.ld, b, c.row(i), c.ld);
    for (; i + 4 <= c.rows; i += 4) triangle_tile<UPPER, 4>(n, first, a.row(i), a.ld, b, c.row(i), c.ld);
    for (; i < c.rows; ++i) triangle_tile<UPPER, 1>(n, first, a.row(i), a.ld, b, c.row(i), c.ld);
  }
  if (first < n) {
    const int64_t above = UPPER ? 0 : first;
    product<Into::kSet>(c.block(0, c.rows, first, n - first), n - above, Left<T>{a.data + above, a.ld, 1},
                        b.block(above, n - above, first, n - first));
  }
}

// A missing cotangent is zero.
template <class T>
void load_or_zero(const Matrix<T>& to, const Batch<const T>& from, int64_t b) {
  if (from.data)
    load_matrix(to, from, b);
  else
    fill_zero(to);
}

// Transposed in, with the padding set to zero.
template <class T>
void load_transposed(const Matrix<T>& to, const Batch<const T>& from, int64_t b) {
  if (from.stride[2] == 1) {
    transpose(to.rows, to.columns, to.data, to.ld, from.at(b), from.stride[1]);
  } else {
    for (int64_t i = 0; i < to.rows; ++i)
      for (int64_t j = 0; j < to.columns; ++j) to.row(i)[j] = *from.at(b, j, i);
  }
  clear_padding(to);
}

// Transposed out; results have rows without gaps.
template <class T>
void store_transposed(const Batch<T>& to, int64_t b, const Matrix<T>& from) {
  transpose(from.columns, from.rows, to.at(b), to.stride[1], from.data, from.ld);
}

template <class T>
T value_or_zero(const Batch<const T>& from, int64_t b, int64_t t) {
  return from.data ? *from.at(b, t) : T(0);
}

// A memory whose mean has its rows for columns, as patterns are columns here. All that is computed from codes is then
// [C, ·]: no product pads codes, and the patterns of a chunk are transposed once in and once out.
template <class T>
struct Turned {
  Matrix<T> mean;  // Rᵀ [C, K]
  Matrix<T> cov;   // U [K, K], both triangles
};

template <class T>
Turned<T> take_turned(const PosteriorArgs<T>& args, Arena& arena) {
  return {take_matrix<T>(arena, args.C, args.K), take_matrix<T>(arena, args.K, args.K)};
}

// The cotangents of a memory, symmetric in the covariance; a missing one is zero.
template <class T>
void load_cotangents(const Turned<T>& grad, const PosteriorGrads<T>& grads, int64_t b) {
  if (grads.mean.data)
    load_transposed(grad.mean, grads.mean, b);
  else
    fill_zero(grad.mean);
  load_or_zero(grad.cov, grads.cov, b);
  symmetrise(grad.cov);
}

template <class T>
void store_cotangents(const PosteriorGrads<T>& grads, int64_t b, const Turned<T>& grad) {
  store_transposed(grads.to_mean, b, grad.mean);
  store_matrix(grads.to_cov, b, grad.cov);
}

// The state before a chunk. It is only ever a left factor, which need not be padded: the first is the caller's own.
template <class T>
struct State {
  Batch<const T> mean, cov;  // of one memory
};

// Rows as they are, or those of a transposed mean.
template <class T>
void load_mean(const Matrix<T>& to, const State<T>& state) {
  const Batch<const T>& mean = state.mean;
  if (mean.stride[1] == 1)
    load_transposed(to, Batch<const T>{mean.data, {0, mean.stride[2], 1}}, 0);
  else
    load_matrix(to, mean, 0);
}

template <class T>
Left<T> left(const Batch<const T>& m) {
  return {m.data, m.stride[1], m.stride[2]};
}
template <class T>
Left<T> transposed(const Batch<const T>& m) {
  return {m.data, m.stride[2], m.stride[1]};
}
template <class T>
Batch<const T> at_memory(const Batch<const T>& m, int64_t b) {
  return {m.at(b), {m.stride[0], m.stride[1], m.stride[2]}};
}
template <class T>
State<T> state_of(const Turned<T>& memory) {
  return {{memory.mean.data, {0, 1, memory.mean.ld}}, {memory.cov.data, {0, memory.cov.ld, 1}}};
}

// A chunk as its backward wants it, with patterns for columns: then states and their cotangents are left factors only.
template <class T>
struct Columns {
  Matrix<T> weights;                             // W [t, K], these as rows
  Matrix<T> whitened;                            // Gᵀ above Eᵀ [K + C, t]
  Matrix<T> inverse;                             // L⁻¹ [t, t]
  T noise[kLargestChunk], pivot[kLargestChunk];  // σ² and L_tt² [t]

  int64_t count() const { return weights.rows; }
};

template <class T>
Columns<T> take_columns(const PosteriorArgs<T>& args, int64_t count, Arena& arena) {
  return {.weights = take_matrix<T>(arena, count, args.K),
          .whitened = take_matrix<T>(arena, args.K + args.C, count),
          .inverse = take_matrix<T>(arena, count, count)};
}

// Like whiten, on the chunk of patterns from `first` on.
template <class T>
void whiten_columns(const State<T>& state, Columns<T>& chunk, const PosteriorArgs<T>& args, int64_t b, int64_t first,
                    Arena& arena) {
  const int64_t K = args.K, C = args.C, count = chunk.count();
  const Matrix<T> inputs = take_matrix<T>(arena, K + C, count), weights_turned = take_matrix<T>(arena, K, count);
  const Matrix<T> projected = inputs.rows_from(0, K), innovations = inputs.rows_from(K, C);
  const Factor<T> factor = take_factor<T>(arena, count);
  load_patterns(chunk.weights, args.weights, args, b, first);
  load_transposed(innovations, args.values.from_row(first), b);
  for (int64_t t = 0; t < count; ++t)
    if (!args.seen(b, first + t))
      for (int64_t c = 0; c < C; ++c) innovations.row(c)[t] = 0;
  transpose(weights_turned, chunk.weights);
  product<Into::kSet>(projected, K, left(state.cov), weights_turned);
  product_lower<Into::kSet>(factor.lower, K, left(chunk.weights), projected);
  factor_variances(factor, args, b, first, chunk.noise, chunk.pivot, arena);
  invert_lower(factor, chunk.inverse, arena);
  product<Into::kSubtract>(innovations, K, transposed(state.mean), weights_turned);
  product_of_triangle<true>(chunk.whitened, inputs, take_transposed(chunk.inverse, arena));
}

// R += Gᵀ E, U −= Gᵀ G.
template <class T>
void absorb(const Turned<T>& memory, const Columns<T>& chunk, Arena& arena) {
  const int64_t K = memory.cov.rows, C = memory.mean.rows;
  const Matrix<T> gain = chunk.whitened.rows_from(0, K), turned = take_transposed(gain, arena);
  product<Into::kAdd>(memory.mean, chunk.count(), left(chunk.whitened.rows_from(K, C)), turned);
  product_lower<Into::kSubtract>(memory.cov, chunk.count(), left(gain), turned);
  mirror(memory.cov);
}

// From the cotangents of a pattern's s, KL and log-likelihood to those of its pivot L_tt², energy ‖E_t‖² and σ².
template <class T>
struct PatternCotangents {
  T pivot = 0, energy = 0, noise = 0;
};
template <class T>
PatternCotangents<T> pattern_cotangents(const Columns<T>& chunk, T energy, int64_t t, const PosteriorArgs<T>& args,
                                        const PosteriorGrads<T>& grads, int64_t b, int64_t first) {
  const T grad_s = value_or_zero(grads.innovation_var, b, first + t), grad_kl = value_or_zero(grads.kl, b, first + t);
  const T grad_evidence = value_or_zero(grads.log_evidence, b, 0);
  if (!args.seen(b, first + t)) return {.noise = grad_s};
  const T noise = chunk.noise[t], pivot = chunk.pivot[t], s = pivot > noise ? pivot : noise;
  const T C = static_cast<T>(args.C);
  PatternCotangents<T> result;
  const T of_s = grad_s + T(0.5) * (grad_kl * (C * (s - noise) + energy * noise) / (s * s) - grad_evidence * C / s);
  (pivot > noise ? result.pivot : result.noise) = of_s;
  result.energy = T(0.5) * (grad_kl * (1 - noise / s) - grad_evidence);
  result.noise += T(0.5) * grad_kl * (C * (1 / s - 1 / noise) - energy / s);
  return result;
}

// Cotangents of what one chunk was conditioned on, patterns for columns; of masked patterns they are meaningless.
template <class T>
struct ChunkCotangents {
  Matrix<T> weights;  // [K, t]
  Matrix<T> values;   // [C, t]
  T noise[kLargestChunk];
};

// With bars for cotangents and primes for what is after the chunk:
//   Ḡ = E R̄'ᵀ − 2 G Ū'          Ē = G R̄' + 2 diag(ē) E
//   V̄ = L⁻ᵀ Ḡ                   Z̄ = L⁻ᵀ Ē
//   N = Ḡ Gᵀ + Ē Eᵀ              S̄ = L⁻ᵀ (diag(L_tt² s̄_t) − ½ N) L⁻¹, with N's lower triangle mirrored
//   V̄ += S̄ W     W̄ += (V̄ + S̄ W) U − Z̄ Rᵀ     R̄ = R̄' − Wᵀ Z̄     Ū = Ū' + sym(Wᵀ V̄)
// as L̄ = −tril(L⁻ᵀ N) + 2 diag(L_tt s̄_t), and the lower triangle of Lᵀ L̄ is all that reaches S̄.
// `state` is that before the chunk; `grad` goes from after the chunk to before it.
template <class T>
ChunkCotangents<T> condition_backward(const State<T>& state, const Turned<T>& grad, const Columns<T>& chunk,
                                      const PosteriorArgs<T>& args, const PosteriorGrads<T>& grads, int64_t b,
                                      int64_t first, Arena& arena, Upcoming* upcoming = nullptr) {
  const int64_t K = args.K, C = args.C, count = chunk.count(), padded = round_up(count, kLanes<T>);
  const auto take = [&](int64_t rows) { return take_matrix<T>(arena, rows, count); };
  const auto upper = [&](const Matrix<T>& m) { return m.rows_from(0, K); };
  const auto lower = [&](const Matrix<T>& m) { return m.rows_from(K, C); };
  const Matrix<T> G = upper(chunk.whitened), E = lower(chunk.whitened), whitened_bar = take(K + C);
  const Matrix<T> G_bar = upper(whitened_bar), E_bar = lower(whitened_bar);
  const Matrix<T> solved = take(K + C), V_bar = upper(solved), Z_bar = lower(solved);
  ChunkCotangents<T> bar{.weights = take(K), .values = Z_bar};

  // Through the state.
  product<Into::kSet>(G_bar, K, left(grad.cov), G, upcoming);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t t = 0; t < padded; ++t) G_bar.row(k)[t] *= -2;
  product<Into::kAdd>(G_bar, C, transposed(grad.mean), E, upcoming);
  product<Into::kSet>(E_bar, K, left(grad.mean), G, upcoming);

  // Through what is told of each pattern.
  T energy[kLargestChunk], energy_bar[kLargestChunk] = {}, pivot_bar[kLargestChunk];
  for (int64_t t = 0; t < padded; t += kLanes<T>) {
    const auto square = [&](int64_t c) { return load(E.row(c) + t) * load(E.row(c) + t); };
    Vec<T> even = {}, odd = {};
    for (int64_t c = 0; c + 1 < C; c += 2) {
      even += square(c);
      odd += square(c + 1);
    }
    if (C % 2) even += square(C - 1);
    store<T>(energy + t, even + odd);
  }
  for (int64_t t = 0; t < count; ++t) {
    const PatternCotangents<T> told = pattern_cotangents(chunk, energy[t], t, args, grads, b, first);
    energy_bar[t] = 2 * told.energy;
    pivot_bar[t] = told.pivot;
    bar.noise[t] = told.noise;
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t t = 0; t < padded; ++t) E_bar.row(c)[t] += energy_bar[t] * E.row(c)[t];

  // Through the whitening, and through the factor.
  const Matrix<T> S_bar = take(count), half = take(count);
  product_of_triangle<false>(solved, whitened_bar, chunk.inverse);
  product_lower<Into::kSet>(S_bar, K + C, transposed(whitened_bar), chunk.whitened);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < padded; ++j) S_bar.row(i)[j] *= T(-0.5);
    S_bar.row(i)[i] += chunk.pivot[i] * pivot_bar[i];
  }
  mirror(S_bar);
  product_of_triangle<false>(half, S_bar, chunk.inverse);
  product<Into::kSet>(S_bar, count, transposed(chunk.inverse), half);
  for (int64_t t = 0; t < count; ++t) bar.noise[t] += S_bar.row(t)[t];

  // Down to the arguments.
  const Matrix<T> shared = take(K);
  product<Into::kSet>(shared, count, transposed(chunk.weights), S_bar);
  add_rows(V_bar, shared);
  product<Into::kAdd>(grad.cov, count, left(V_bar), chunk.weights, upcoming);
  symmetrise(grad.cov);
  product<Into::kSubtract>(grad.mean, count, left(Z_bar), chunk.weights, upcoming);
  add_rows(V_bar, shared);
  product<Into::kSet>(bar.weights, K, left(state.cov), V_bar, upcoming);
  product<Into::kSubtract>(bar.weights, C, left(state.mean), Z_bar, upcoming);
  return bar;
}

// Cotangents [B, T, ·] of a chunk: a masked pattern has no say, so nothing flows back to it.
template <class T>
void clear_masked(const Batch<T>& cotangents, int64_t width, const PosteriorArgs<T>& args, int64_t b, int64_t first,
                  int64_t count) {
  for (int64_t t = first; t < first + count; ++t)
    if (!args.seen(b, t)) __builtin_memset(cotangents.at(b, t), 0, static_cast<size_t>(width) * sizeof(T));
}

template <class T>
void store_patterns(const Batch<T>& to, const Matrix<T>& columns, const PosteriorArgs<T>& args, int64_t b,
                    int64_t first) {
  store_transposed(to.from_row(first), b, columns);
  clear_masked(to, columns.rows, args, b, first, columns.columns);
}

// Call `backward(state, chunk, first)` on every chunk of `size` patterns from the last to the first, with the state
// before it. States and chunks are those of one memory only, in working memory.
template <class T, class Backward>
void reverse_chunks(const PosteriorArgs<T>& args, int64_t size, int64_t b, Arena& arena, const Backward& backward) {
  const int64_t chunks = (args.T_ + size - 1) / size;
  Turned<T>* memories = arena.take<Turned<T>>(chunks);
  State<T>* states = arena.take<State<T>>(chunks);
  Columns<T>* columns = arena.take<Columns<T>>(chunks);
  for (int64_t n = 0; n < chunks; ++n) {
    if (n > 0) memories[n] = take_turned(args, arena);
    states[n] = n > 0 ? state_of(memories[n]) : State<T>{at_memory(args.mean, b), at_memory(args.cov, b)};
    columns[n] = take_columns(args, smaller(size, args.T_ - n * size), arena);
  }
  const Arena::Mark chunk_start = arena.mark();
  for (int64_t n = 0; n < chunks; ++n) {
    arena.release(chunk_start);
    if (n > 0) {
      if (n == 1)
        load_transposed(memories[n].mean, states[0].mean, 0);
      else
        copy_rows(memories[n].mean, memories[n - 1].mean);
      load_matrix(memories[n].cov, states[n - 1].cov, 0);
      absorb(memories[n], columns[n - 1], arena);
    }
    whiten_columns(states[n], columns[n], args, b, n * size, arena);
  }
  for (int64_t n = chunks - 1; n >= 0; --n) {
    arena.release(chunk_start);
    backward(states[n], columns[n], n * size);
  }
}

// What is still to be touched of a memory, and of the next, where both fit the cache.
template <class T>
Upcoming upcoming_gradients(const PosteriorArgs<T>& args, const PosteriorGrads<T>& grads, int64_t b, int64_t end) {
  constexpr int64_t kMostBytes = 1 << 20;
  const int64_t K = args.K, C = args.C, patterns = args.T_, rows = FASTKM_TILE_ROWS;
  const int64_t tiles = (4 * K + C) / rows + (K + C) / rows * strips<T>(K);
  Upcoming upcoming(1 + (patterns + kBackwardChunk - 1) / kBackwardChunk * tiles);
  if ((3 * K + 2 * patterns) * (K + C) * static_cast<int64_t>(sizeof(T)) > kMostBytes) return upcoming;
  upcoming.add(grads.to_weights, b, 0, patterns, K);
  upcoming.add(grads.to_values, b, 0, patterns, C);
  upcoming.add(grads.to_mean, b, 0, K, C);
  upcoming.add(grads.to_cov, b, 0, K, K);
  if (b + 1 == end) return upcoming;
  upcoming.add(grads.mean, b + 1, 0, K, C);
  upcoming.add(grads.cov, b + 1, 0, K, K);
  upcoming.add(args.weights, b + 1, 0, patterns, K);
  upcoming.add(args.values, b + 1, 0, patterns, C);
  upcoming.add(args.mean, b + 1, 0, K, C);
  upcoming.add(args.cov, b + 1, 0, K, K);
  return upcoming;
}

template <class T>
void update_posterior_backward(const PosteriorArgs<T>& args, const PosteriorGrads<T>& grads, int64_t begin,
                               int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Turned<T> grad = take_turned(args, arena);
    load_cotangents(grad, grads, b);
    Upcoming upcoming = upcoming_gradients(args, grads, b, end);
    reverse_chunks(args, kBackwardChunk, b, arena, [&](const State<T>& state, const Columns<T>& chunk, int64_t first) {
      const ChunkCotangents<T> bar = condition_backward(state, grad, chunk, args, grads, b, first, arena, &upcoming);
      store_patterns(grads.to_weights, bar.weights, args, b, first);
      store_patterns(grads.to_values, bar.values, args, b, first);
      for (int64_t t = 0; t < chunk.count(); ++t) *grads.to_noise_var.at(b, first + t) = bar.noise[t];
    });
    store_cotangents(grads, b, grad);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
