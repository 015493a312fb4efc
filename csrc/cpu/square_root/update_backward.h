// Backward of the update of a root: equations (1) to (4) of update.h, from the last chunk to the first.
//
// With bars for cotangents, primes for what comes after the chunk, and D = diag(1/(√s + σ)):
//   (5)  Ē = G R̄',  Ḡ = E R̄'ᵀ − D F S̄'ᵀ,  (DF)‾ = −G S̄',  Z̄ = L⁻ᵀ Ē,  L̄ = −tril(Z̄ Eᵀ),  H̄ = Ḡ S
//   (6)  P̄ and σ̄², from the cotangents of D F, H and L: the reflections (2) and (3) backwards, one after the other.
//        What a reflection was applied to is found by applying its inverse to what it made.
//   (7)  W̄ = P̄ Sᵀ − Z̄ Rᵀ,  R̄ = R̄' − Wᵀ Z̄,  S̄ = S̄' + Ḡᵀ H + Wᵀ P̄.
// The memories before all chunks are computed first and kept: K (C + K) numbers a chunk.
#pragma once

#include "cpu/posterior/conditioning_backward.h"
#include "cpu/square_root/update.h"

namespace fastkm::FASTKM_LEVEL {

// The cotangents of a chunk of reflections, which (6) adds to.
template <class Real>
struct ReflectionCotangents {
  Matrix<Real> forward;              // F̄ [t, K]; P̄ at the end
  Matrix<Real> backward;             // H̄ [t, K]
  Matrix<Real> lower;                // L̄ [t, t]
  Real *shrink, *deviation, *scale;  // of 1/(√s + σ), √s and 1/c [t]
  Real* noise;                       // σ̄² [t], out
};

// (6) for the row of H that pattern `t` makes.
template <class Real>
void backward_of_backward(const ReflectionCotangents<Real>& to, const Reflections<Real>& found, int64_t t,
                          Real* reflected, int64_t padded) {
  const Real deviation = found.factor.lower.row(t)[t];
  Real* grad = to.backward.row(t);
  to.deviation[t] -= dot(padded, grad, found.backward.row(t)) / deviation;
  for (int64_t k = 0; k < padded; ++k) {
    reflected[k] = found.backward.row(t)[k] * deviation;
    grad[k] /= deviation;
  }
  for (int64_t i = 0; i < t; ++i) {
    const Real *f = found.forward.row(i), along = found.along.row(t)[i], scale = found.scale[i];
    const Real grad_along = dot(padded, f, grad);
    add_scaled(padded, reflected, along * scale, f);
    add_scaled(padded, to.forward.row(i), -along * scale, grad);
    add_scaled(padded, to.forward.row(i), -scale * grad_along, reflected);
    to.scale[i] -= along * grad_along;
    add_scaled(padded, grad, -scale * grad_along, f);
  }
  add_scaled(padded, to.forward.row(t), Real(1), grad);
}

// (6) for the row of F and of L that pattern `t` makes.
template <class Real>
void backward_of_forward(const ReflectionCotangents<Real>& to, const Reflections<Real>& found, int64_t t,
                         Real* reflected, int64_t padded) {
  Real* grad = to.forward.row(t);
  __builtin_memcpy(reflected, found.forward.row(t), static_cast<size_t>(padded) * sizeof(Real));
  for (int64_t i = t - 1; i >= 0; --i) {
    const Real *f = found.forward.row(i), scale = found.scale[i], pivot = found.factor.lower.row(i)[i];
    const Real lower = found.factor.lower.row(t)[i], along = lower * pivot, grad_lower = to.lower.row(t)[i];
    const Real grad_along = dot(padded, f, grad), total = grad_lower / pivot - scale * grad_along;
    add_scaled(padded, reflected, along * scale, f);
    add_scaled(padded, to.forward.row(i), -along * scale, grad);
    add_scaled(padded, to.forward.row(i), total, reflected);
    to.deviation[i] -= grad_lower * lower / pivot;
    to.scale[i] -= along * grad_along;
    add_scaled(padded, grad, total, f);
  }
}

template <class Real>
void reflections_backward(const ReflectionCotangents<Real>& to, const Reflections<Real>& found, const Real* noise_var,
                          Arena& arena) {
  const int64_t count = found.forward.rows, padded = round_up(found.forward.columns, kLanes<Real>);
  Real* reflected = arena.allocate<Real>(padded);
  for (int64_t t = count - 1; t >= 0; --t) {
    backward_of_backward(to, found, t, reflected, padded);
    const Real root = found.factor.lower.row(t)[t], sigma = std::sqrt(noise_var[t]);
    const Real of_shrink = to.shrink[t] / ((root + sigma) * (root + sigma));
    const Real of_scale = to.scale[t] * found.scale[t] * found.scale[t];
    to.deviation[t] += to.lower.row(t)[t] - of_shrink - of_scale * (2 * root + sigma);
    const Real of_s = to.deviation[t] / (2 * root);
    add_scaled(padded, to.forward.row(t), 2 * of_s, found.forward.row(t));
    to.noise[t] = of_s - (of_shrink + of_scale * root) / (2 * sigma);
    backward_of_forward(to, found, t, reflected, padded);
  }
}

// A chunk of patterns, brought in.
template <class Real>
struct RootChunk {
  Matrix<Real> weights, values;  // W [t, K], Z [t, C]
  Observations<Real> observed;
  MemoryRows<Real> before;  // the memory before it
  ReflectedRows<Real> reflected;
};

// The chunks of memory `b`, reflected, and the memories before them.
template <class Real>
RootChunk<Real>* load_root_chunks(const PosteriorArgs<Real>& args, int64_t b, int64_t size, int64_t chunks,
                                  Arena& arena) {
  RootChunk<Real>* loaded = arena.allocate<RootChunk<Real>>(chunks);
  for (int64_t n = 0; n < chunks; ++n) {
    const int64_t first = n * size, count = smaller(size, args.T - first);
    RootChunk<Real>& chunk = loaded[n];
    chunk.weights = allocate_matrix<Real>(arena, count, args.K);
    chunk.values = allocate_matrix<Real>(arena, count, args.C);
    chunk.observed = load_observations(args, b, first, count, arena);
    chunk.before = {allocate_cleared<Real>(arena, args.K, args.C), allocate_cleared<Real>(arena, args.K, args.K)};
    load_patterns(chunk.weights, args.weights.from_row(first), b, chunk.observed.unmasked);
    load_patterns(chunk.values, args.values.from_row(first), b, chunk.observed.unmasked);
    if (n == 0) {
      load_matrix(chunk.before.mean, args.mean, b);
      load_matrix(chunk.before.cov, args.cov, b);
    } else {
      update_root(chunk.before, loaded[n - 1].before, loaded[n - 1].reflected);
    }
    // Whitening may overwrite the values.
    const Matrix<Real> values = allocate_matrix<Real>(arena, count, args.C);
    copy_rows(values, chunk.values);
    chunk.reflected = reflect_rows(chunk.before, chunk.weights, values, chunk.observed, arena);
  }
  return loaded;
}

// Cotangents of the patterns of a chunk.
template <class Real>
struct RootPatternCotangents {
  Matrix<Real> weights;  // W̄ᵀ [K, t]
  Matrix<Real> values;   // Z̄ [t, C]
  const Real* noise;
};

// One chunk. `grad` goes in as the cotangents of the memory after it and comes out as those of the memory before it.
template <class Real>
RootPatternCotangents<Real> root_backward(const MemoryRows<Real>& grad, const RootChunk<Real>& chunk, Arena& arena) {
  const ReflectedRows<Real>& made = chunk.reflected;
  const int64_t K = grad.cov.rows, C = grad.mean.columns, count = chunk.weights.rows;
  const Matrix<Real> gain = transposed_copy(made.gain_transposed, arena),
                     inverse = allocate_matrix<Real>(arena, count, count);
  const Matrix<Real> grad_E = allocate_matrix<Real>(arena, count, C), grad_Z = allocate_matrix<Real>(arena, count, C);
  const Matrix<Real> grad_gain = allocate_matrix<Real>(arena, K, count);  // Ḡᵀ
  invert_lower(made.found.factor, inverse, arena);
  product<Into::kSet>(grad_E, K, operand(gain), grad.mean);  // (5)
  const Matrix<Real> errors = transposed_copy(made.values, arena);
  product<Into::kSet>(grad_gain, C, operand(grad.mean), errors);
  product<Into::kSubtract>(grad_gain, K, operand(grad.cov), transposed_copy(made.shrunk, arena));
  product<Into::kSet>(grad_Z, count, transposed(inverse), grad_E);

  const auto vector = [&] { return allocate_zero<Real>(arena, 1, count).data; };
  const ReflectionCotangents<Real> to{allocate_zero<Real>(arena, count, K),
                                      allocate_zero<Real>(arena, count, K),
                                      allocate_matrix<Real>(arena, count, count),
                                      vector(),
                                      vector(),
                                      vector(),
                                      vector()};
  product<Into::kSubtract>(to.forward, K, operand(gain), grad.cov);
  clear_padding(to.forward);
  for (int64_t t = 0; t < count; ++t) {
    const Matrix<Real> row = to.forward.rows_from(t, 1);
    to.shrink[t] = dot(K, row.data, made.found.forward.row(t));
    scale(row, 1 / (made.found.factor.lower.row(t)[t] + std::sqrt(chunk.observed.noise_var[t])));
  }
  product<Into::kSet>(to.backward, K, transposed(grad_gain), chunk.before.cov);
  clear_padding(to.backward);
  product<Into::kSet>(to.lower, C, operand(grad_Z), errors);
  scale(to.lower, Real(-1));
  product<Into::kAdd>(grad.cov, count, operand(grad_gain), made.found.backward);
  reflections_backward(to, made.found, chunk.observed.noise_var, arena);  // (6)

  const Matrix<Real> weights = allocate_matrix<Real>(arena, K, count);  // (7)
  product<Into::kSet>(weights, K, operand(chunk.before.cov), transposed_copy(to.forward, arena));
  product<Into::kSubtract>(weights, C, operand(chunk.before.mean), transposed_copy(grad_Z, arena));
  product<Into::kAdd>(grad.cov, count, transposed(chunk.weights), to.forward);
  product<Into::kSubtract>(grad.mean, count, transposed(chunk.weights), grad_Z);
  return {weights, grad_Z, to.noise};
}

template <class Real>
void update_square_root_backward_one(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t b) {
  // Bring in.
  Arena& arena = Arena::fresh();
  const MemoryRows<Real> grad{allocate_matrix<Real>(arena, args.K, args.C),
                              allocate_matrix<Real>(arena, args.K, args.K)};
  load_or_zero(grad.mean, grads.mean, b);
  load_or_zero(grad.cov, grads.cov, b);
  const int64_t size = kLargestBackwardChunk, chunks = (args.T + size - 1) / size;
  const RootChunk<Real>* loaded = load_root_chunks(args, b, size, chunks, arena);
  const Arena::Mark end = arena.mark();

  // Compute, and put out what belongs to a chunk.
  for (int64_t n = chunks - 1; n >= 0; --n) {
    arena.release(end);
    const RootChunk<Real>& chunk = loaded[n];
    const RootPatternCotangents<Real> to = root_backward(grad, chunk, arena);
    const int64_t first = n * size, count = chunk.weights.rows;
    store_patterns(grads.to_weights.from_row(first), b, to.weights, chunk.observed.unmasked);
    store_matrix(grads.to_values.from_row(first), b, to.values);
    clear_masked(grads.to_values.from_row(first), b, args.C, chunk.observed.unmasked, count);
    for (int64_t t = 0; t < count; ++t) *grads.to_noise_var.at(b, first + t) = to.noise[t];
  }

  // Put out what belongs to the memory.
  store_matrix(grads.to_mean, b, grad.mean);
  store_matrix(grads.to_cov, b, grad.cov);
}

template <class Real>
void update_square_root_backward(const PosteriorArgs<Real>& args, const PosteriorGrads<Real>& grads, int64_t begin,
                                 int64_t end) {
  for (int64_t b = begin; b < end; ++b) update_square_root_backward_one(args, grads, b);
}

}  // namespace fastkm::FASTKM_LEVEL
