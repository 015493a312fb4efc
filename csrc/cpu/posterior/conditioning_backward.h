// Backward of conditioning on a chunk of patterns, shared by the backward of an update and that of a write.
#pragma once

#include "cpu/linalg/triangle.h"
#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

// The backward of an update goes over the state so often that it takes more at once.
constexpr int64_t kBackwardChunk = 32;
constexpr int64_t kLargestChunk = kBackwardChunk > kChunk ? kBackwardChunk : kChunk;

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

}  // namespace fastkm::FASTKM_LEVEL
