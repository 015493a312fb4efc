// Backward of conditioning a memory on chunks of patterns. Patterns, and the rows of the memory's mean, are columns.
//
// In this orientation everything made of codes is [C, ·], so no product pads codes, and a chunk is transposed once on
// the way in and once on the way out. States and their cotangents are only left operands, which need no padding.
//
// With S, L, G and E of conditioning.h, bars for cotangents and primes for what comes after the chunk:
//   (1)  Ḡ = E R̄'ᵀ − 2 G Ū',  Ē = G R̄' + 2 diag(ē) E, where ē_t is the cotangent of ‖E_t‖²
//   (2)  V̄ = L⁻ᵀ Ḡ,  Z̄ = L⁻ᵀ Ē
//   (3)  N = Ḡ Gᵀ + Ē Eᵀ, its lower triangle mirrored,  S̄ = L⁻ᵀ (diag(L_tt² p̄_t) − ½ N) L⁻¹
//   (4)  V̄ += S̄ W,  R̄ = R̄' − Wᵀ Z̄,  Ū = Ū' + sym(Wᵀ V̄),  W̄ = (V̄ + S̄ W) U − Z̄ Rᵀ.
// In (3), p̄_t is the cotangent of e_t, which is L_tt² − σ_t². There L̄ = −tril(L⁻ᵀ N) + 2 diag(L_tt p̄_t), and only the
// lower triangle of Lᵀ L̄ reaches S̄.
//
// σ_t² enters S_tt and leaves e_t again, so that S̄_tt − p̄_t reaches it. With x = e/σ², the divergence of a small step
// has p̄ of the size x, and its cotangent of σ² has the size x²: p̄_t is left out of the sum S̄_tt, not subtracted from
// it.
//
// A chunk costs about 8 t K C + 6 t K² operations. The states before all chunks are computed first and kept: K (C + K)
// numbers a chunk.
#pragma once

#include "cpu/linalg/triangle.h"
#include "cpu/posterior/conditioning.h"

namespace fastkm::FASTKM_LEVEL {

// Patterns of the largest chunk that the backward takes: that of an update.
constexpr int64_t kLargestBackwardChunk = 32;
static_assert(kLargestBackwardChunk >= kChunk);

// A memory with the transpose of its mean.
template <class Real>
struct MemoryColumns {
  Matrix<Real> mean;  // Rᵀ [C, K]
  Matrix<Real> cov;   // U [K, K], both triangles
};

template <class Real>
MemoryColumns<Real> allocate_memory_columns(int64_t K, int64_t C, Arena& arena) {
  return {allocate_matrix<Real>(arena, C, K), allocate_matrix<Real>(arena, K, K)};
}

// A memory as operands of products, wherever it is.
template <class Real>
struct MemoryView {
  Operand<Real> mean;             // R
  Operand<Real> mean_transposed;  // Rᵀ
  Operand<Real> cov;              // U
};

template <class Real>
MemoryView<Real> view_of(const MemoryColumns<Real>& memory) {
  return {transposed(memory.mean), operand(memory.mean), operand(memory.cov)};
}

// The caller's memory `b`.
template <class Real>
MemoryView<Real> view_of(const PosteriorArgs<Real>& args, int64_t b) {
  const Operand<Real> mean{args.mean.at(b), args.mean.stride[1], args.mean.stride[2]};
  return {mean, {mean.data, mean.column, mean.row}, {args.cov.at(b), args.cov.stride[1], args.cov.stride[2]}};
}

// Copy the cotangents of a memory in, symmetric in the covariance. A missing one is zero.
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

// The cotangents of what an update or a write reports.
template <class Real>
struct ReportCotangents {
  const Real *s, *kl;  // [t]
  Real log_evidence;
};

// A chunk of patterns as its backward needs it. Masked patterns have zeros for weights and values.
template <class Real>
struct ChunkColumns {
  Matrix<Real> weights;         // W [t, K]
  Matrix<Real> values;          // Zᵀ [C, t]
  Observations<Real> observed;  // [t]
  ReportCotangents<Real> grad;  // [t]

  int64_t count() const { return weights.rows; }
};

// Copy in the chunk of `count` patterns from `first` on.
template <class Real>
ChunkColumns<Real> load_chunk(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t b,
                              int64_t first, int64_t count, Arena& arena) {
  const Matrix<Real> weights = allocate_matrix<Real>(arena, count, args.K);
  const Matrix<Real> values = allocate_matrix<Real>(arena, args.C, count);
  const Observations<Real> observed = load_observations(args, b, first, count, arena);
  load_patterns(weights, args.weights.from_row(first), b, observed.unmasked);
  load_transposed(values, args.values.from_row(first), b);
  Real *grad_s = arena.allocate<Real>(count), *grad_kl = arena.allocate<Real>(count);
  for (int64_t t = 0; t < count; ++t) {
    grad_s[t] = value_or_zero(grads.innovation_var, b, first + t);
    grad_kl[t] = value_or_zero(grads.kl, b, first + t);
    if (observed.unmasked[t]) continue;
    for (int64_t c = 0; c < args.C; ++c) values.row(c)[t] = 0;
  }
  return {weights, values, observed, {grad_s, grad_kl, value_or_zero(grads.log_evidence, b, 0)}};
}

// A chunk whitened against the memory before it.
template <class Real>
struct WhitenedColumns {
  Matrix<Real> inputs;                    // Gᵀ above Eᵀ [K + C, t]
  Matrix<Real> inverse;                   // L⁻¹ [t, t]
  Real pivot[kLargestBackwardChunk];      // L_tt² [t]
  Real explained[kLargestBackwardChunk];  // e [t]
  Status status = kGood;                  // of U before the chunk and after it
};

template <class Real>
WhitenedColumns<Real> allocate_whitened_columns(int64_t K, int64_t C, int64_t count, Arena& arena) {
  return {.inputs = allocate_matrix<Real>(arena, K + C, count), .inverse = allocate_matrix<Real>(arena, count, count)};
}

// (1) and (2) of conditioning.h. A removal has −U in the place of U.
template <Direction DIRECTION = Direction::kIn, class Real>
void whiten_columns(WhitenedColumns<Real>& whitened, const MemoryView<Real>& memory, const ChunkColumns<Real>& chunk,
                    const Limits<Real>& limits, Arena& arena) {
  const int64_t K = chunk.weights.columns, C = chunk.values.rows, count = chunk.count();
  const Matrix<Real> inputs = allocate_matrix<Real>(arena, K + C, count);
  const Matrix<Real> projected = inputs.rows_from(0, K), innovations = inputs.rows_from(K, C);
  const Matrix<Real> weights_transposed = transposed_copy(chunk.weights, arena);
  const Factor<Real> factor = allocate_factor<Real>(arena, count);
  product<Into::kSet>(projected, K, memory.cov, weights_transposed);
  product_lower<Into::kSet>(factor.lower, K, operand(chunk.weights), projected);
  bool positive = true;
  if constexpr (DIRECTION == Direction::kOut) {
    Real* diagonal = copy_diagonal(memory.cov, K, arena);
    for (int64_t k = 0; k < K; ++k) diagonal[k] = -diagonal[k];
    whitened.status = factor_removal(factor, whitened.pivot, whitened.explained, chunk.weights,
                                     chunk.observed.noise_var, diagonal, limits, arena);
  } else {
    positive =
        factor_variances(factor, whitened.pivot, whitened.explained, K, chunk.observed.noise_var, arena, limits.eps);
  }
  invert_lower(factor, whitened.inverse, arena);
  product<Into::kSubtract>(innovations, chunk.values, K, memory.mean_transposed, weights_transposed);
  product_of_triangle<true>(whitened.inputs, inputs, transposed_copy(whitened.inverse, arena));
  if constexpr (DIRECTION == Direction::kOut) return;
  const Matrix<Real> gain = whitened.inputs.rows_from(0, K);
  const Real taken = static_cast<Real>(inner_product(gain, gain));
  whitened.status = chunk_status(positive, whitened, taken, chunk.observed, memory.cov, chunk.weights, limits, arena);
}

// (3) of conditioning.h.
template <class Real>
void update_memory(const MemoryColumns<Real>& memory, const WhitenedColumns<Real>& whitened, Arena& arena) {
  const int64_t K = memory.cov.rows, C = memory.mean.rows, count = whitened.inverse.rows;
  const Matrix<Real> gain_transposed = whitened.inputs.rows_from(0, K), gain = transposed_copy(gain_transposed, arena);
  product<Into::kAdd>(memory.mean, count, operand(whitened.inputs.rows_from(K, C)), gain);
  product_lower<Into::kSubtract>(memory.cov, count, operand(gain_transposed), gain);
  mirror(memory.cov);
}

// Cotangents of what a chunk was conditioned on. Those of masked patterns are meaningless.
template <class Real>
struct ChunkCotangents {
  Matrix<Real> weights;  // W̄ᵀ [K, t]
  Matrix<Real> values;   // Z̄ᵀ [C, t]
  Real noise[kLargestBackwardChunk];
};

// Cotangents of a pattern's e, ‖E_t‖² and σ², as if these were independent, from those of its s = e + σ² and KL and of
// ln p(Z).
template <class Real>
struct PatternCotangents {
  Real explained = 0, energy = 0, noise = 0;
};
template <class Real>
PatternCotangents<Real> pattern_cotangents(const ChunkColumns<Real>& chunk, Real explained, Real energy, int64_t t) {
  const Real grad_s = chunk.grad.s[t], grad_kl = chunk.grad.kl[t], grad_evidence = chunk.grad.log_evidence;
  if (!chunk.observed.unmasked[t]) return {.noise = grad_s};
  const Real noise = chunk.observed.noise_var[t], s = explained + noise, beta = explained / s;
  const Real C = static_cast<Real>(chunk.values.rows), of_s = grad_s - Real(0.5) * grad_evidence * C / s;
  const Real of_kl = Real(0.5) * grad_kl / s;
  return {.explained = explained > 0 ? of_s + of_kl * (C * beta + energy * (noise / s)) : 0,
          .energy = Real(0.5) * (grad_kl * beta - grad_evidence),
          .noise = of_s - of_kl * beta * (C * (explained / noise) + energy)};
}

// energies = ‖E_t‖², from Eᵀ [C, t].
template <class Real>
void column_norms(const Matrix<Real>& columns, Real* energies) {
  const int64_t C = columns.rows, padded = round_up(columns.columns, kLanes<Real>);
  for (int64_t t = 0; t < padded; t += kLanes<Real>) {
    const auto square = [&](int64_t c) { return load(columns.row(c) + t) * load(columns.row(c) + t); };
    Vec<Real> even = {}, odd = {};
    for (int64_t c = 0; c + 1 < C; c += 2) {
      even += square(c);
      odd += square(c + 1);
    }
    if (C % 2) even += square(C - 1);
    store<Real>(energies + t, even + odd);
  }
}

// (1): [Ḡ Ē]ᵀ [K + C, t] from the cotangents of the memory after the chunk.
template <class Real>
void whitened_cotangents(const Matrix<Real>& grad_whitened, const MemoryColumns<Real>& grad,
                         const WhitenedColumns<Real>& whitened, const Real* grad_energy, Prefetch* prefetch) {
  const int64_t K = grad.cov.rows, C = grad.mean.rows, padded = round_up(grad_whitened.columns, kLanes<Real>);
  const Matrix<Real> G = whitened.inputs.rows_from(0, K), E = whitened.inputs.rows_from(K, C);
  const Matrix<Real> grad_G = grad_whitened.rows_from(0, K), grad_E = grad_whitened.rows_from(K, C);
  product<Into::kSet>(grad_G, K, operand(grad.cov), G, prefetch);
  for (int64_t k = 0; k < K; ++k)
    for (int64_t t = 0; t < padded; ++t) grad_G.row(k)[t] *= -2;
  product<Into::kAdd>(grad_G, C, transposed(grad.mean), E, prefetch);
  product<Into::kSet>(grad_E, K, operand(grad.mean), G, prefetch);
  for (int64_t c = 0; c < C; ++c)
    for (int64_t t = 0; t < padded; ++t) grad_E.row(c)[t] += 2 * grad_energy[t] * E.row(c)[t];
}

// (3): S̄ [t, t] from [Ḡ Ē]ᵀ and the cotangents of e. Adds S̄_tt, without the term p̄_t of its sum, to `grad_noise`, which
// has room for a whole number of vector registers.
template <class Real>
Matrix<Real> variance_cotangents(const Matrix<Real>& grad_whitened, const WhitenedColumns<Real>& whitened,
                                 const Real* grad_explained, Real* grad_noise, Arena& arena) {
  constexpr int64_t W = kLanes<Real>;
  const int64_t count = whitened.inverse.rows, padded = round_up(count, W);
  const auto lane = lane_numbers<Real>();
  const Matrix<Real> grad_S = allocate_matrix<Real>(arena, count, count);
  const Matrix<Real> solved = allocate_matrix<Real>(arena, count, count);
  product_lower<Into::kSet>(grad_S, grad_whitened.rows, transposed(grad_whitened), whitened.inputs);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < padded; ++j) grad_S.row(i)[j] *= Real(-0.5);
  mirror(grad_S);
  product_of_triangle<false>(solved, grad_S, whitened.inverse);
  for (int64_t i = 0; i < count; ++i) {
    const Real of_pivot = whitened.pivot[i] * grad_explained[i];
    for (int64_t t = 0; t <= i; t += W) {
      const auto below = static_cast<LaneNumber<Real>>(i - t);
      const Vec<Real> inverse = lane <= below ? load(whitened.inverse.row(i) + t) : Vec<Real>{};
      const Vec<Real> row = load(solved.row(i) + t), term = of_pivot * inverse;
      store<Real>(grad_noise + t, load(grad_noise + t) + inverse * (row + (lane < below ? term : Vec<Real>{})));
      store<Real>(solved.row(i) + t, row + term);
    }
  }
  product<Into::kSet>(grad_S, count, transposed(whitened.inverse), solved);
  return grad_S;
}

// Backward of conditioning on one chunk. `memory` is the one before the chunk; `grad` goes in as the cotangents of the
// memory after the chunk and comes out as those of the memory before it.
template <class Real>
ChunkCotangents<Real> condition_backward(const MemoryColumns<Real>& grad, const MemoryView<Real>& memory,
                                         const ChunkColumns<Real>& chunk, const WhitenedColumns<Real>& whitened,
                                         Arena& arena, Prefetch* prefetch = nullptr) {
  const int64_t K = grad.cov.rows, C = grad.mean.rows, count = chunk.count();
  const Matrix<Real> grad_whitened = allocate_matrix<Real>(arena, K + C, count);
  const Matrix<Real> solved = allocate_matrix<Real>(arena, K + C, count);
  const Matrix<Real> V = solved.rows_from(0, K), Z = solved.rows_from(K, C);  // V̄ᵀ and Z̄ᵀ
  ChunkCotangents<Real> to{.weights = allocate_matrix<Real>(arena, K, count), .values = Z};

  Real energy[kLargestBackwardChunk], grad_energy[kLargestBackwardChunk] = {};
  Real grad_explained[kLargestBackwardChunk] = {};
  column_norms(whitened.inputs.rows_from(K, C), energy);
  for (int64_t t = 0; t < count; ++t) {
    const PatternCotangents<Real> of = pattern_cotangents(chunk, whitened.explained[t], energy[t], t);
    grad_energy[t] = of.energy;
    grad_explained[t] = of.explained;
    to.noise[t] = of.noise;
  }

  whitened_cotangents(grad_whitened, grad, whitened, grad_energy, prefetch);                                  // (1)
  product_of_triangle<false>(solved, grad_whitened, whitened.inverse);                                        // (2)
  const Matrix<Real> grad_S = variance_cotangents(grad_whitened, whitened, grad_explained, to.noise, arena);  // (3)

  // (4). S̄ W enters V̄ once before Ū and once more before W̄.
  const Matrix<Real> S_W = allocate_matrix<Real>(arena, K, count);
  product<Into::kSet>(S_W, count, transposed(chunk.weights), grad_S);
  add_rows(V, S_W);
  product<Into::kAdd>(grad.cov, count, operand(V), chunk.weights, prefetch);
  symmetrise(grad.cov);
  product<Into::kSubtract>(grad.mean, count, operand(Z), chunk.weights, prefetch);
  add_rows(V, S_W);
  product<Into::kSet>(to.weights, K, memory.cov, V, prefetch);
  product<Into::kSubtract>(to.weights, C, memory.mean, Z, prefetch);
  return to;
}

// Set the cotangents [B, T, width] of a chunk's masked patterns to zero: nothing flows back to them.
template <class Real>
void clear_masked(const Batch<Real>& to, int64_t b, int64_t width, const bool* unmasked, int64_t count) {
  for (int64_t t = 0; t < count; ++t)
    if (!unmasked[t]) __builtin_memset(to.at(b, t), 0, static_cast<size_t>(width) * sizeof(Real));
}

// Copy the cotangents of a chunk's patterns out, from their columns.
template <class Real>
void store_patterns(const Batch<Real>& to, int64_t b, const Matrix<Real>& columns, const bool* unmasked) {
  store_transposed(to, b, columns);
  clear_masked(to, b, columns.rows, unmasked, columns.columns);
}

// The chunks of one memory: brought in, whitened, and the states before them.
template <class Real>
struct Episode {
  int64_t size;   // patterns of a chunk but the last
  int64_t count;  // of chunks
  bool copies;    // the first memory is in memories[0]; else products read the caller's
  ChunkColumns<Real>* chunks;
  WhitenedColumns<Real>* whitened;
  MemoryColumns<Real>* memories;  // before each chunk
  MemoryView<Real> callers;
  Arena::Mark end;  // of what an episode holds in the arena

  MemoryView<Real> before(int64_t n) const { return n > 0 || copies ? view_of(memories[n]) : callers; }
};

// Bring an episode in, in chunks of `size` patterns.
template <class Real>
Episode<Real> load_episode(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t b, int64_t size,
                           bool copies, Arena& arena) {
  const int64_t count = (args.T + size - 1) / size;
  Episode<Real> episode{.size = size,
                        .count = count,
                        .copies = copies,
                        .chunks = arena.allocate<ChunkColumns<Real>>(count),
                        .whitened = arena.allocate<WhitenedColumns<Real>>(count),
                        .memories = arena.allocate<MemoryColumns<Real>>(count),
                        .callers = view_of(args, b),
                        .end = {}};
  for (int64_t n = 0; n < count; ++n) {
    const int64_t first = n * size, patterns = smaller(size, args.T - first);
    if (n > 0 || copies) episode.memories[n] = allocate_memory_columns<Real>(args.K, args.C, arena);
    episode.whitened[n] = allocate_whitened_columns<Real>(args.K, args.C, patterns, arena);
    episode.chunks[n] = load_chunk(args, grads, b, first, patterns, arena);
  }
  const int64_t copied = copies ? 0 : 1;  // the first memory in working memory
  if (copied < count) {
    load_transposed(episode.memories[copied].mean, args.mean, b);
    load_matrix(episode.memories[copied].cov, args.cov, b);
  }
  episode.end = arena.mark();
  return episode;
}

// Whiten every chunk against the memory before it. The memory before a chunk is the one before the previous chunk,
// updated. Returns early if the episode is to be computed again.
template <Direction DIRECTION = Direction::kIn, class Real>
Status whiten_episode(const Episode<Real>& episode, const Limits<Real>& limits, Arena& arena) {
  for (int64_t n = 0; n < episode.count; ++n) {
    arena.release(episode.end);
    if (n > 0) {
      const MemoryColumns<Real>& memory = episode.memories[n];
      if (n > 1 || episode.copies) {
        copy_rows(memory.mean, episode.memories[n - 1].mean);
        copy_rows(memory.cov, episode.memories[n - 1].cov);
      }
      update_memory(memory, episode.whitened[n - 1], arena);
    }
    whiten_columns<DIRECTION>(episode.whitened[n], episode.before(n), episode.chunks[n], limits, arena);
    if (limits.again(episode.whitened[n].status)) return episode.whitened[n].status;
  }
  return kGood;
}

}  // namespace fastkm::FASTKM_LEVEL
