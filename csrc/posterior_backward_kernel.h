// Backward of the posterior update: the block form differentiated, chunk by chunk from the last to the first.
#pragma once

#include "posterior_kernel.h"

namespace fastkm::FASTKM_LEVEL {

// a ← (a + aᵀ) / 2
template <class T>
void symmetrise(const Matrix<T>& a) {
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < i; ++j) a.row(i)[j] = a.row(j)[i] = T(0.5) * (a.row(i)[j] + a.row(j)[i]);
}

// a += (x yᵀ + y xᵀ) / 2 for one pair of matrices [t, K] whose rows are the vectors.
template <class T>
void add_symmetric_product(const Matrix<T>& a, const Matrix<T>& x, const Matrix<T>& y, Arena& arena) {
  const Matrix<T> term = take_matrix<T>(arena, a.rows, a.rows);
  product<Into::kSet>(term, x.rows, transposed(x), y);
  symmetrise(term);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.rows; ++j) a.row(i)[j] += term.row(i)[j];
}

template <class T>
Matrix<T> take_transposed(const Matrix<T>& m, Arena& arena) {
  const Matrix<T> result = take_matrix<T>(arena, m.columns, m.rows);
  transpose(result, m);
  return result;
}

// A missing cotangent is zero.
template <class T>
void load_or_zero(const Matrix<T>& to, const Batch<const T>& from, int64_t b) {
  if (from.data)
    load_matrix(to, from, b);
  else
    fill_zero(to);
}

template <class T>
T value_or_zero(const Batch<const T>& from, int64_t b, int64_t t) {
  return from.data ? *from.at(b, t) : T(0);
}

// The cotangents of a memory, symmetric in the covariance.
template <class T>
void load_cotangents(const Memory<T>& grad, const PosteriorGrads<T>& grads, int64_t b) {
  load_or_zero(grad.mean, grads.mean, b);
  load_or_zero(grad.cov, grads.cov, b);
  symmetrise(grad.cov);
}

// From the cotangents of a pattern's s, KL and log-likelihood to those of its pivot L_tt², energy ‖E_t‖² and σ².
template <class T>
struct PatternCotangents {
  T pivot = 0, energy = 0, noise = 0;
};
template <class T>
PatternCotangents<T> pattern_cotangents(const Chunk<T>& chunk, int64_t t, const PosteriorArgs<T>& args,
                                        const PosteriorGrads<T>& grads, int64_t b, int64_t first) {
  const T grad_s = value_or_zero(grads.innovation_var, b, first + t), grad_kl = value_or_zero(grads.kl, b, first + t);
  const T grad_evidence = value_or_zero(grads.log_evidence, b, 0);
  if (!args.seen(b, first + t)) return {.noise = grad_s};
  const T noise = chunk.noise[t], pivot = chunk.pivot(t), s = pivot > noise ? pivot : noise;
  const T C = static_cast<T>(args.C), energy = dot(args.C, chunk.values.row(t), chunk.values.row(t));
  PatternCotangents<T> result;
  const T of_s = grad_s + T(0.5) * (grad_kl * (C * (s - noise) + energy * noise) / (s * s) - grad_evidence * C / s);
  (pivot > noise ? result.pivot : result.noise) = of_s;
  result.energy = T(0.5) * (grad_kl * (1 - noise / s) - grad_evidence);
  result.noise += T(0.5) * grad_kl * (C * (1 / s - 1 / noise) - energy / s);
  return result;
}

// Cotangents of what one chunk was conditioned on; rows of masked patterns are meaningless until cleared.
template <class T>
struct ChunkCotangents {
  Matrix<T> weights;  // [t, K]; holds what else depends on the weights, and is added to
  Matrix<T> values;   // [t, C]
  T noise[kLargestChunk];
};

// With bars for cotangents and primes for what is after the chunk:
//   Ḡ = E R̄'ᵀ − 2 G Ū'          Ē = G R̄' + 2 diag(ē) E
//   V̄ = L⁻ᵀ Ḡ                   Z̄ = L⁻ᵀ Ē
//   L̄ = −tril(V̄ Gᵀ + Z̄ Eᵀ) + 2 diag(L_tt s̄_t)      S̄ = L⁻ᵀ Φ(Lᵀ L̄) L⁻¹, symmetric
//   V̄ += S̄ W     W̄ += S̄ V − Z̄ Rᵀ + V̄ U     R̄ = R̄' − Wᵀ Z̄     Ū = Ū' + sym(Wᵀ V̄)
// `memory` is the state before the chunk; `grad` goes from after the chunk to before it.
template <class T>
void condition_backward(const Memory<T>& memory, const Memory<T>& grad, const Chunk<T>& chunk,
                        const PosteriorArgs<T>& args, const PosteriorGrads<T>& grads, int64_t b, int64_t first,
                        ChunkCotangents<T>& bar, Arena& arena) {
  const int64_t K = args.K, C = args.C, count = chunk.count();
  const Matrix<T>&E = chunk.values, &G = chunk.gain, &L = chunk.factor.lower;
  const Matrix<T> V_bar = take_matrix<T>(arena, count, K), Z_bar = bar.values;
  const Matrix<T> L_bar = take_matrix<T>(arena, count, count), S_bar = take_matrix<T>(arena, count, count);

  // Through the state.
  product<Into::kSet>(V_bar, K, left(G), grad.cov);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t k = 0; k < V_bar.ld; ++k) V_bar.row(t)[k] *= -2;
  product<Into::kAdd>(V_bar, C, left(E), take_transposed(grad.mean, arena));
  product<Into::kSet>(Z_bar, K, left(G), grad.mean);

  // Through what is told of each pattern.
  T pivot_bar[kLargestChunk];
  for (int64_t t = 0; t < count; ++t) {
    const PatternCotangents<T> told = pattern_cotangents(chunk, t, args, grads, b, first);
    pivot_bar[t] = told.pivot;
    bar.noise[t] = told.noise;
    for (int64_t c = 0; c < C; ++c) Z_bar.row(t)[c] += 2 * told.energy * E.row(t)[c];
  }

  // Through the whitening.
  solve_lower_transposed(chunk.factor, V_bar, arena);
  solve_lower_transposed(chunk.factor, Z_bar, arena);
  product<Into::kSet>(L_bar, K, left(V_bar), take_transposed(G, arena));
  product<Into::kAdd>(L_bar, C, left(Z_bar), take_transposed(E, arena));
  const Matrix<T> L_zeroed = take_matrix<T>(arena, count, count);
  fill_zero(L_zeroed);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < L_bar.ld; ++j) {
      L_bar.row(i)[j] = j > i ? 0 : -L_bar.row(i)[j] + (j == i ? 2 * L.row(i)[i] * pivot_bar[i] : 0);
      if (j <= i) L_zeroed.row(i)[j] = L.row(i)[j];
    }

  // Through the Cholesky factor: the lower triangle of Lᵀ L̄, halved and mirrored, between L⁻ᵀ and L⁻¹.
  product<Into::kSet>(S_bar, count, transposed(L_zeroed), L_bar);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j) S_bar.row(i)[j] *= T(0.5);
  mirror(S_bar);
  solve_lower_transposed(chunk.factor, S_bar, arena);
  transpose(L_bar, S_bar);
  solve_lower_transposed(chunk.factor, L_bar, arena);
  symmetrise(L_bar);
  copy_rows(S_bar, L_bar);
  for (int64_t t = 0; t < count; ++t) bar.noise[t] += S_bar.row(t)[t];

  // Down to the arguments.
  product<Into::kAdd>(V_bar, count, left(S_bar), chunk.weights);
  product<Into::kAdd>(bar.weights, count, left(S_bar), chunk.projected);
  product<Into::kSubtract>(bar.weights, C, left(Z_bar), take_transposed(memory.mean, arena));
  product<Into::kAdd>(bar.weights, K, left(V_bar), memory.cov);
  product<Into::kSubtract>(grad.mean, count, transposed(chunk.weights), Z_bar);
  add_symmetric_product(grad.cov, chunk.weights, V_bar, arena);
}

// A masked pattern has no say, so nothing flows back to it.
template <class T>
void clear_masked(const Matrix<T>& rows, const PosteriorArgs<T>& args, int64_t b, int64_t first) {
  for (int64_t t = 0; t < rows.rows; ++t)
    if (!args.seen(b, first + t)) __builtin_memset(rows.row(t), 0, static_cast<size_t>(rows.columns) * sizeof(T));
}

template <class T>
Memory<T> take_memory(const PosteriorArgs<T>& args, Arena& arena) {
  return {take_matrix<T>(arena, args.K, args.C), take_matrix<T>(arena, args.K, args.K)};
}

template <class T>
void copy_memory(const Memory<T>& to, const Memory<T>& from) {
  copy_rows(to.mean, from.mean);
  copy_rows(to.cov, from.cov);
}

// Call `backward(memory, chunk, first)` on every chunk of `size` patterns from the last to the first, with the state
// before it. The states are those of one memory only, one a chunk, in working memory.
template <class T, class Backward>
void reverse_chunks(const PosteriorArgs<T>& args, int64_t size, int64_t b, Arena& arena, const Backward& backward) {
  const int64_t chunks = (args.T_ + size - 1) / size, most = smaller(size, args.T_);
  const Matrix<T> weights = take_matrix<T>(arena, most, args.K), values = take_matrix<T>(arena, most, args.C);
  const int64_t mean_ld = row_stride<T>(args.C), cov_ld = row_stride<T>(args.K);
  const auto state_at = [&, all = arena.take<T>(chunks * args.K * (mean_ld + cov_ld))](int64_t chunk) {
    T* at = all + chunk * args.K * (mean_ld + cov_ld);
    return Memory<T>{{at, args.K, args.C, mean_ld}, {at + args.K * mean_ld, args.K, args.K, cov_ld}};
  };
  const auto load_chunk = [&](const Memory<T>& memory, int64_t chunk) {
    const int64_t first = chunk * size, count = smaller(size, args.T_ - first);
    load_patterns(weights.rows_from(0, count), args.weights, args, b, first);
    load_patterns(values.rows_from(0, count), args.values, args, b, first);
    return whiten(memory, weights.rows_from(0, count), values.rows_from(0, count), args, b, first, arena);
  };
  const Arena::Mark chunk_start = arena.mark();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    arena.release(chunk_start);
    if (chunk == 0) {
      load_matrix(state_at(0).mean, args.mean, b);
      load_matrix(state_at(0).cov, args.cov, b);
    } else {
      copy_memory(state_at(chunk), state_at(chunk - 1));
      absorb(state_at(chunk), load_chunk(state_at(chunk - 1), chunk - 1));
    }
  }
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    arena.release(chunk_start);
    backward(state_at(chunk), load_chunk(state_at(chunk), chunk), chunk * size);
  }
}

template <class T>
void update_posterior_backward(const PosteriorArgs<T>& args, const PosteriorGrads<T>& grads, int64_t begin,
                               int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Memory<T> grad = take_memory(args, arena);
    load_cotangents(grad, grads, b);
    reverse_chunks(args, kBackwardChunk, b, arena, [&](const Memory<T>& memory, const Chunk<T>& chunk, int64_t first) {
      ChunkCotangents<T> bar{take_matrix<T>(arena, chunk.count(), args.K),
                             take_matrix<T>(arena, chunk.count(), args.C)};
      fill_zero(bar.weights);
      condition_backward(memory, grad, chunk, args, grads, b, first, bar, arena);
      clear_masked(bar.weights, args, b, first);
      clear_masked(bar.values, args, b, first);
      store_matrix(grads.to_weights.from_row(first), b, bar.weights);
      store_matrix(grads.to_values.from_row(first), b, bar.values);
      for (int64_t t = 0; t < chunk.count(); ++t) *grads.to_noise_var.at(b, first + t) = bar.noise[t];
    });
    store_matrix(grads.to_mean, b, grad.mean);
    store_matrix(grads.to_cov, b, grad.cov);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
