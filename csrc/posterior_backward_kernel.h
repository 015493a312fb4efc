// Backward of the posterior update: the block form differentiated, chunk by chunk from the last to the first.
#pragma once

#include "posterior_kernel.h"

namespace fastkm::FASTKM_LEVEL {

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

// L⁻¹ in full, zero above the diagonal.
template <class T>
Matrix<T> take_inverse(const Factor<T>& f, Arena& arena) {
  const int64_t n = f.size();
  const Matrix<T> inverse = take_matrix<T>(arena, n, n), work = take_matrix<T>(arena, kBlock, n);
  fill_zero(inverse);
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t width = smaller(kBlock, n - j);
    copy_rows(inverse.block(j, width, j, width), f.inverse_block(j).block(0, width, 0, width));
    if (j == 0) continue;
    product<Into::kSet>(work.block(0, width, 0, j), j, left(f.lower.rows_from(j, width)), inverse);
    const Matrix<T> before = inverse.block(j, width, 0, j);
    product<Into::kSubtract>(before, width, left(f.inverse_block(j)), work);
  }
  return inverse;
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
PatternCotangents<T> pattern_cotangents(const Chunk<T>& chunk, T energy, int64_t t, const PosteriorArgs<T>& args,
                                        const PosteriorGrads<T>& grads, int64_t b, int64_t first) {
  const T grad_s = value_or_zero(grads.innovation_var, b, first + t), grad_kl = value_or_zero(grads.kl, b, first + t);
  const T grad_evidence = value_or_zero(grads.log_evidence, b, 0);
  if (!args.seen(b, first + t)) return {.noise = grad_s};
  const T noise = chunk.noise[t], pivot = chunk.pivot(t), s = pivot > noise ? pivot : noise;
  const T C = static_cast<T>(args.C);
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
//   N = Ḡ Gᵀ + Ē Eᵀ              S̄ = L⁻ᵀ (diag(L_tt² s̄_t) − ½ N) L⁻¹, with N's lower triangle mirrored
//   V̄ += S̄ W     W̄ += (V̄ + S̄ W) U − Z̄ Rᵀ     R̄ = R̄' − Wᵀ Z̄     Ū = Ū' + sym(Wᵀ V̄)
// The lower triangle of Lᵀ L̄ is that of −N, as L̄ = −tril(L⁻ᵀ N). Patterns are columns here: then states and their
// cotangents are left factors only, and need no transposing.
// `memory` is the state before the chunk; `grad` goes from after the chunk to before it.
template <class T>
void condition_backward(const Memory<T>& memory, const Memory<T>& grad, const Chunk<T>& chunk,
                        const PosteriorArgs<T>& args, const PosteriorGrads<T>& grads, int64_t b, int64_t first,
                        ChunkCotangents<T>& bar, Arena& arena) {
  const int64_t K = args.K, C = args.C, both = K + C, count = chunk.count();
  const auto take = [&](int64_t rows) { return take_matrix<T>(arena, rows, count); };
  const Matrix<T> whitened = take(both), G = whitened.rows_from(0, K), E = whitened.rows_from(K, C);
  const Matrix<T> whitened_bar = take(both), G_bar = whitened_bar.rows_from(0, K), E_bar = whitened_bar.rows_from(K, C);
  const int64_t padded = round_up(count, kLanes<T>);
  transpose(G, chunk.gain);
  transpose(E, chunk.values);

  // Through the state.
  product<Into::kSet>(G_bar, K, left(grad.cov), G);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t t = 0; t < padded; ++t) G_bar.row(k)[t] *= -2;
  product<Into::kAdd>(G_bar, C, left(grad.mean), E);
  product<Into::kSet>(E_bar, K, transposed(grad.mean), G);

  // Through what is told of each pattern.
  constexpr int64_t kMost = kLargestChunk + kBlock;
  T energy[kMost] = {}, energy_bar[kMost] = {}, pivot_bar[kMost];
  for (int64_t c = 0; c < C; ++c)
    for (int64_t t = 0; t < padded; ++t) energy[t] += E.row(c)[t] * E.row(c)[t];
  for (int64_t t = 0; t < count; ++t) {
    const PatternCotangents<T> told = pattern_cotangents(chunk, energy[t], t, args, grads, b, first);
    energy_bar[t] = 2 * told.energy;
    pivot_bar[t] = told.pivot;
    bar.noise[t] = told.noise;
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t t = 0; t < padded; ++t) E_bar.row(c)[t] += energy_bar[t] * E.row(c)[t];

  // Through the whitening, and through the factor.
  const Matrix<T> inverse = take_inverse(chunk.factor, arena), S_bar = take(count), work = take(count);
  const Matrix<T> solved = take(both), V_bar = solved.rows_from(0, K), Z_bar = solved.rows_from(K, C);
  product<Into::kSet>(solved, count, left(whitened_bar), inverse);
  product_lower<Into::kSet>(S_bar, both, transposed(whitened_bar), whitened);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < padded; ++j) S_bar.row(i)[j] *= T(-0.5);
    S_bar.row(i)[i] += chunk.pivot(i) * pivot_bar[i];
  }
  mirror(S_bar);
  product<Into::kSet>(work, count, left(S_bar), inverse);
  product<Into::kSet>(S_bar, count, transposed(inverse), work);
  for (int64_t t = 0; t < count; ++t) bar.noise[t] += S_bar.row(t)[t];

  // Down to the arguments.
  const Matrix<T> shared = take(K), W_bar = take(K), turned = take_matrix<T>(arena, count, K);
  product<Into::kSet>(shared, count, transposed(chunk.weights), S_bar);
  add_rows(V_bar, shared);
  product<Into::kAdd>(grad.cov, count, left(V_bar), chunk.weights);
  symmetrise(grad.cov);
  transpose(bar.values, Z_bar);
  product<Into::kSubtract>(grad.mean, count, transposed(chunk.weights), bar.values);
  add_rows(V_bar, shared);
  product<Into::kSet>(W_bar, K, left(memory.cov), V_bar);
  product<Into::kSubtract>(W_bar, C, left(memory.mean), Z_bar);
  transpose(turned, W_bar);
  add_rows(bar.weights, turned);
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
// before it. States and chunks are those of one memory only, in working memory.
template <class T, class Backward>
void reverse_chunks(const PosteriorArgs<T>& args, int64_t size, int64_t b, Arena& arena, const Backward& backward) {
  const int64_t chunks = (args.T_ + size - 1) / size;
  const Matrix<T> values = take_matrix<T>(arena, smaller(size, args.T_), args.C);
  Memory<T>* states = arena.take<Memory<T>>(chunks);
  Chunk<T>* whitened = arena.take<Chunk<T>>(chunks);
  for (int64_t n = 0; n < chunks; ++n) {
    const int64_t first = n * size, count = smaller(size, args.T_ - first);
    states[n] = take_memory(args, arena);
    if (n == 0) {
      load_matrix(states[0].mean, args.mean, b);
      load_matrix(states[0].cov, args.cov, b);
    } else {
      copy_memory(states[n], states[n - 1]);
      absorb(states[n], whitened[n - 1]);
    }
    const Matrix<T> weights = take_matrix<T>(arena, count, args.K), chunk_values = values.rows_from(0, count);
    load_patterns(weights, args.weights, args, b, first);
    load_patterns(chunk_values, args.values, args, b, first);
    whitened[n] = whiten(states[n], weights, chunk_values, args, b, first, arena);
  }
  const Arena::Mark chunk_start = arena.mark();
  for (int64_t n = chunks - 1; n >= 0; --n) {
    arena.release(chunk_start);
    backward(states[n], whitened[n], n * size);
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
