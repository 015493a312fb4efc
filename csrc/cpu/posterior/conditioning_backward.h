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
template <class Real>
struct MemoryColumns {
  Matrix<Real> mean;  // Rᵀ [C, K]
  Matrix<Real> cov;   // U [K, K], both triangles
};

template <class Real>
MemoryColumns<Real> allocate_memory_columns(const PosteriorArgs<Real>& args, Arena& arena) {
  return {allocate_matrix<Real>(arena, args.C, args.K), allocate_matrix<Real>(arena, args.K, args.K)};
}

// The cotangents of a memory, symmetric in the covariance; a missing one is zero.
template <class Real>
void load_cotangents(const MemoryColumns<Real>& grad, const PosteriorGrads<Real>& grads, int64_t b) {
  if (grads.mean.data)
    load_transposed(grad.mean, grads.mean, b);
  else
    fill_zero(grad.mean);
  load_or_zero(grad.cov, grads.cov, b);
  symmetrise(grad.cov);
}

template <class Real>
void store_cotangents(const PosteriorGrads<Real>& grads, int64_t b, const MemoryColumns<Real>& grad) {
  store_transposed(grads.to_mean, b, grad.mean);
  store_matrix(grads.to_cov, b, grad.cov);
}

// The state before a chunk. It is only ever a left factor, which need not be padded: the first is the caller's own.
template <class Real>
struct MemoryView {
  Batch<const Real> mean, cov;  // of one memory
};

// Rows as they are, or those of a transposed mean.
template <class Real>
void load_mean(const Matrix<Real>& to, const MemoryView<Real>& state) {
  const Batch<const Real>& mean = state.mean;
  if (mean.stride[1] == 1)
    load_transposed(to, Batch<const Real>{mean.data, {0, mean.stride[2], 1}}, 0);
  else
    load_matrix(to, mean, 0);
}

template <class Real>
Batch<const Real> matrix_at(const Batch<const Real>& m, int64_t b) {
  return {m.at(b), {m.stride[0], m.stride[1], m.stride[2]}};
}
template <class Real>
MemoryView<Real> view_of(const MemoryColumns<Real>& memory) {
  return {{memory.mean.data, {0, 1, memory.mean.ld}}, {memory.cov.data, {0, memory.cov.ld, 1}}};
}

// A chunk as its backward wants it, with patterns for columns: then states and their cotangents are left factors only.
template <class Real>
struct WhitenedColumns {
  Matrix<Real> weights;                             // W [t, K], these as rows
  Matrix<Real> whitened;                            // Gᵀ above Eᵀ [K + C, t]
  Matrix<Real> inverse;                             // L⁻¹ [t, t]
  Real noise[kLargestChunk], pivot[kLargestChunk];  // σ² and L_tt² [t]

  int64_t count() const { return weights.rows; }
};

template <class Real>
WhitenedColumns<Real> allocate_whitened_columns(const PosteriorArgs<Real>& args, int64_t count, Arena& arena) {
  return {.weights = allocate_matrix<Real>(arena, count, args.K),
          .whitened = allocate_matrix<Real>(arena, args.K + args.C, count),
          .inverse = allocate_matrix<Real>(arena, count, count)};
}

// Like whiten, on the chunk of patterns from `first` on.
template <class Real>
void whiten_columns(const MemoryView<Real>& state, WhitenedColumns<Real>& chunk, const PosteriorArgs<Real>& args,
                    int64_t b, int64_t first, Arena& arena) {
  const int64_t K = args.K, C = args.C, count = chunk.count();
  const Matrix<Real> inputs = allocate_matrix<Real>(arena, K + C, count),
                     weights_transposed = allocate_matrix<Real>(arena, K, count);
  const Matrix<Real> projected = inputs.rows_from(0, K), innovations = inputs.rows_from(K, C);
  const Factor<Real> factor = allocate_factor<Real>(arena, count);
  load_patterns(chunk.weights, args.weights, args, b, first);
  load_transposed(innovations, args.values.from_row(first), b);
  for (int64_t t = 0; t < count; ++t)
    if (!args.unmasked(b, first + t))
      for (int64_t c = 0; c < C; ++c) innovations.row(c)[t] = 0;
  transpose(weights_transposed, chunk.weights);
  product<Into::kSet>(projected, K, operand(state.cov), weights_transposed);
  product_lower<Into::kSet>(factor.lower, K, operand(chunk.weights), projected);
  factor_variances(factor, args, b, first, chunk.noise, chunk.pivot, arena);
  invert_lower(factor, chunk.inverse, arena);
  product<Into::kSubtract>(innovations, K, transposed(state.mean), weights_transposed);
  product_of_triangle<true>(chunk.whitened, inputs, transposed_copy(chunk.inverse, arena));
}

// R += Gᵀ E, U −= Gᵀ G.
template <class Real>
void update_memory(const MemoryColumns<Real>& memory, const WhitenedColumns<Real>& chunk, Arena& arena) {
  const int64_t K = memory.cov.rows, C = memory.mean.rows;
  const Matrix<Real> gain = chunk.whitened.rows_from(0, K), turned = transposed_copy(gain, arena);
  product<Into::kAdd>(memory.mean, chunk.count(), operand(chunk.whitened.rows_from(K, C)), turned);
  product_lower<Into::kSubtract>(memory.cov, chunk.count(), operand(gain), turned);
  mirror(memory.cov);
}

// From the cotangents of a pattern's s, KL and log-likelihood to those of its pivot L_tt², energy ‖E_t‖² and σ².
template <class Real>
struct PatternCotangents {
  Real pivot = 0, energy = 0, noise = 0;
};
template <class Real>
PatternCotangents<Real> pattern_cotangents(const WhitenedColumns<Real>& chunk, Real energy, int64_t t,
                                           const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads,
                                           int64_t b, int64_t first) {
  const Real grad_s = value_or_zero(grads.innovation_var, b, first + t),
             grad_kl = value_or_zero(grads.kl, b, first + t);
  const Real grad_evidence = value_or_zero(grads.log_evidence, b, 0);
  if (!args.unmasked(b, first + t)) return {.noise = grad_s};
  const Real noise = chunk.noise[t], pivot = chunk.pivot[t], s = pivot > noise ? pivot : noise;
  const Real C = static_cast<Real>(args.C);
  PatternCotangents<Real> result;
  const Real of_s =
      grad_s + Real(0.5) * (grad_kl * (C * (s - noise) + energy * noise) / (s * s) - grad_evidence * C / s);
  (pivot > noise ? result.pivot : result.noise) = of_s;
  result.energy = Real(0.5) * (grad_kl * (1 - noise / s) - grad_evidence);
  result.noise += Real(0.5) * grad_kl * (C * (1 / s - 1 / noise) - energy / s);
  return result;
}

// Cotangents of what one chunk was conditioned on, patterns for columns; of masked patterns they are meaningless.
template <class Real>
struct ChunkCotangents {
  Matrix<Real> weights;  // [K, t]
  Matrix<Real> values;   // [C, t]
  Real noise[kLargestChunk];
};

// With bars for cotangents and primes for what is after the chunk:
//   Ḡ = E R̄'ᵀ − 2 G Ū'          Ē = G R̄' + 2 diag(ē) E
//   V̄ = L⁻ᵀ Ḡ                   Z̄ = L⁻ᵀ Ē
//   N = Ḡ Gᵀ + Ē Eᵀ              S̄ = L⁻ᵀ (diag(L_tt² s̄_t) − ½ N) L⁻¹, with N's lower triangle mirrored
//   V̄ += S̄ W     W̄ += (V̄ + S̄ W) U − Z̄ Rᵀ     R̄ = R̄' − Wᵀ Z̄     Ū = Ū' + sym(Wᵀ V̄)
// as L̄ = −tril(L⁻ᵀ N) + 2 diag(L_tt s̄_t), and the lower triangle of Lᵀ L̄ is all that reaches S̄.
// `state` is that before the chunk; `grad` goes from after the chunk to before it.
template <class Real>
ChunkCotangents<Real> condition_backward(const MemoryView<Real>& state, const MemoryColumns<Real>& grad,
                                         const WhitenedColumns<Real>& chunk, const PosteriorArgs<Real>& args,
                                         const PosteriorGrads<Real>& grads, int64_t b, int64_t first, Arena& arena,
                                         Prefetch* prefetch = nullptr) {
  const int64_t K = args.K, C = args.C, count = chunk.count(), padded = round_up(count, kLanes<Real>);
  const auto allocate = [&](int64_t rows) { return allocate_matrix<Real>(arena, rows, count); };
  const auto upper = [&](const Matrix<Real>& m) { return m.rows_from(0, K); };
  const auto lower = [&](const Matrix<Real>& m) { return m.rows_from(K, C); };
  const Matrix<Real> G = upper(chunk.whitened), E = lower(chunk.whitened), whitened_bar = allocate(K + C);
  const Matrix<Real> G_bar = upper(whitened_bar), E_bar = lower(whitened_bar);
  const Matrix<Real> solved = allocate(K + C), V_bar = upper(solved), Z_bar = lower(solved);
  ChunkCotangents<Real> bar{.weights = allocate(K), .values = Z_bar};

  // Through the state.
  product<Into::kSet>(G_bar, K, operand(grad.cov), G, prefetch);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t t = 0; t < padded; ++t) G_bar.row(k)[t] *= -2;
  product<Into::kAdd>(G_bar, C, transposed(grad.mean), E, prefetch);
  product<Into::kSet>(E_bar, K, operand(grad.mean), G, prefetch);

  // Through what is told of each pattern.
  Real energy[kLargestChunk], energy_bar[kLargestChunk] = {}, pivot_bar[kLargestChunk];
  for (int64_t t = 0; t < padded; t += kLanes<Real>) {
    const auto square = [&](int64_t c) { return load(E.row(c) + t) * load(E.row(c) + t); };
    Vec<Real> even = {}, odd = {};
    for (int64_t c = 0; c + 1 < C; c += 2) {
      even += square(c);
      odd += square(c + 1);
    }
    if (C % 2) even += square(C - 1);
    store<Real>(energy + t, even + odd);
  }
  for (int64_t t = 0; t < count; ++t) {
    const PatternCotangents<Real> told = pattern_cotangents(chunk, energy[t], t, args, grads, b, first);
    energy_bar[t] = 2 * told.energy;
    pivot_bar[t] = told.pivot;
    bar.noise[t] = told.noise;
  }
  for (int64_t c = 0; c < C; ++c)
    for (int64_t t = 0; t < padded; ++t) E_bar.row(c)[t] += energy_bar[t] * E.row(c)[t];

  // Through the whitening, and through the factor.
  const Matrix<Real> S_bar = allocate(count), half = allocate(count);
  product_of_triangle<false>(solved, whitened_bar, chunk.inverse);
  product_lower<Into::kSet>(S_bar, K + C, transposed(whitened_bar), chunk.whitened);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < padded; ++j) S_bar.row(i)[j] *= Real(-0.5);
    S_bar.row(i)[i] += chunk.pivot[i] * pivot_bar[i];
  }
  mirror(S_bar);
  product_of_triangle<false>(half, S_bar, chunk.inverse);
  product<Into::kSet>(S_bar, count, transposed(chunk.inverse), half);
  for (int64_t t = 0; t < count; ++t) bar.noise[t] += S_bar.row(t)[t];

  // Down to the arguments.
  const Matrix<Real> shared = allocate(K);
  product<Into::kSet>(shared, count, transposed(chunk.weights), S_bar);
  add_rows(V_bar, shared);
  product<Into::kAdd>(grad.cov, count, operand(V_bar), chunk.weights, prefetch);
  symmetrise(grad.cov);
  product<Into::kSubtract>(grad.mean, count, operand(Z_bar), chunk.weights, prefetch);
  add_rows(V_bar, shared);
  product<Into::kSet>(bar.weights, K, operand(state.cov), V_bar, prefetch);
  product<Into::kSubtract>(bar.weights, C, operand(state.mean), Z_bar, prefetch);
  return bar;
}

// Cotangents [B, T, ·] of a chunk: a masked pattern has no say, so nothing flows back to it.
template <class Real>
void clear_masked(const Batch<Real>& cotangents, int64_t width, const PosteriorArgs<Real>& args, int64_t b,
                  int64_t first, int64_t count) {
  for (int64_t t = first; t < first + count; ++t)
    if (!args.unmasked(b, t)) __builtin_memset(cotangents.at(b, t), 0, static_cast<size_t>(width) * sizeof(Real));
}

template <class Real>
void store_patterns(const Batch<Real>& to, const Matrix<Real>& columns, const PosteriorArgs<Real>& args, int64_t b,
                    int64_t first) {
  store_transposed(to.from_row(first), b, columns);
  clear_masked(to, columns.rows, args, b, first, columns.columns);
}

// Call `backward(state, chunk, first)` on every chunk of `size` patterns from the last to the first, with the state
// before it. States and chunks are those of one memory only, in working memory.
template <class Real, class Backward>
void reverse_chunks(const PosteriorArgs<Real>& args, int64_t size, int64_t b, Arena& arena, const Backward& backward) {
  const int64_t chunks = (args.T_ + size - 1) / size;
  MemoryColumns<Real>* memories = arena.allocate<MemoryColumns<Real>>(chunks);
  MemoryView<Real>* states = arena.allocate<MemoryView<Real>>(chunks);
  WhitenedColumns<Real>* columns = arena.allocate<WhitenedColumns<Real>>(chunks);
  for (int64_t n = 0; n < chunks; ++n) {
    if (n > 0) memories[n] = allocate_memory_columns(args, arena);
    states[n] = n > 0 ? view_of(memories[n]) : MemoryView<Real>{matrix_at(args.mean, b), matrix_at(args.cov, b)};
    columns[n] = allocate_whitened_columns(args, smaller(size, args.T_ - n * size), arena);
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
      update_memory(memories[n], columns[n - 1], arena);
    }
    whiten_columns(states[n], columns[n], args, b, n * size, arena);
  }
  for (int64_t n = chunks - 1; n >= 0; --n) {
    arena.release(chunk_start);
    backward(states[n], columns[n], n * size);
  }
}

}  // namespace fastkm::FASTKM_LEVEL
