// The write: find the weights of a chunk of patterns in Gram space, then condition on all of them at once.
//
// Each pattern's weights depend on what was written before it, but only through inner products. With A = R Rᵀ + λI,
// X = Z Rᵀ and Q = Z Zᵀ the search lives in K and T; the codes themselves are needed twice a chunk, for one Gram
// product before it and for the block update after it. Starting each chunk from the mean itself keeps the cost linear
// in T, and keeps rounding from adding up over a long stream.
#pragma once

#include <utility>

#include "posterior_kernel.h"
#include "reading_kernel.h"

namespace fastkm::FASTKM_LEVEL {

// What the search for the weights needs, kept up to date with what was written.
template <class T>
struct GramSpace {
  Matrix<T> gram;    // G = R Rᵀ [K, K]
  Matrix<T> cross;   // X = Z Rᵀ [T, K]
  Matrix<T> inner;   // Q = Z Zᵀ [T, T], lower triangle
  Matrix<T> cov;     // U [K, K]
  Matrix<T> weights; // [T, K], out
};

// X and Q of the patterns still to come, after one with weights w moved the mean by c δᵀ: x ← x + c (δ · z).
template <class T>
void advance_cross(const GramSpace<T>& space, int64_t t, const T* w, const T* c, int64_t padded) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t later = t + 1; later < space.cross.rows; ++later) {
    T* x = space.cross.row(later);
    const T along = space.inner.row(later)[t] - dot(padded, w, x);
    for (int64_t i = 0; i < padded; i += W) store<T>(x + i, load(x + i) + along * load(c + i));
  }
}

// One pass over a symmetric matrix M: M −= l₁ r₁ᵀ + … + lₙ rₙᵀ with the pending pairs, and y = M x with the result.
template <int PAIRS, class T>
void update_and_multiply(const Matrix<T>& m, int64_t padded, const T* const (&l)[PAIRS], const T* const (&r)[PAIRS],
                         const T* x, T* y) {
  constexpr int64_t W = kLanes<T>;
  constexpr int kVecs = 4;
  int64_t j = 0;
  const auto pass = [&]<int VECS>() {
    Vec<T> sum[VECS] = {}, right[PAIRS][VECS];
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) right[p][v] = load(r[p] + j + v * W);
    for (int64_t i = 0; i < m.rows; ++i) {
      T* row = m.row(i) + j;
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        Vec<T> entry = load(row + v * W);
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; ++p) entry -= l[p][i] * right[p][v];
        store<T>(row + v * W, entry);
        sum[v] += x[i] * entry;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) store<T>(y + j + v * W, sum[v]);
  };
  for (; j + kVecs * W <= padded; j += kVecs * W) pass.template operator()<kVecs>();
  for (; j < padded; j += W) pass.template operator()<1>();
}

// y₁ = M x₁ and y₂ = M x₂ in one pass over a symmetric matrix M.
template <class T>
void multiply_two(const Matrix<T>& m, int64_t padded, const T* x1, const T* x2, T* y1, T* y2) {
  constexpr int64_t W = kLanes<T>;
  constexpr int kVecs = 4;
  int64_t j = 0;
  const auto pass = [&]<int VECS>() {
    Vec<T> first[VECS] = {}, second[VECS] = {};
    for (int64_t i = 0; i < m.rows; ++i) {
      const T* row = m.row(i) + j;
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        const Vec<T> entry = load(row + v * W);
        first[v] += x1[i] * entry;
        second[v] += x2[i] * entry;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      store<T>(y1 + j + v * W, first[v]);
      store<T>(y2 + j + v * W, second[v]);
    }
  };
  for (; j + kVecs * W <= padded; j += kVecs * W) pass.template operator()<kVecs>();
  for (; j < padded; j += W) pass.template operator()<1>();
}

// The ridge solve, once a pattern. With w exact, R δ = λ w, so A changes by [c w] [[d, λ], [λ, 0]] [c w]ᵀ, and its
// inverse H by Woodbury: H −= [p q] N⁻¹ [p q]ᵀ with p = H c, q = H w, N = [[d, λ], [λ, 0]]⁻¹ + [c w]ᵀ H [c w]. No
// factorisation after the first. Changes of H and U wait for the next pass over them, which they share.
template <class T>
Status find_weights(const GramSpace<T>& space, const WritingArgs<T>& args, int64_t b, int64_t first, Arena& arena) {
  const int64_t K = args.posterior.K, padded = round_up(K, kLanes<T>);
  const T ridge = *args.ridge.at(b);
  const Factor<T> factor = take_factor<T>(arena, K);
  const Matrix<T> inverse = take_matrix<T>(arena, K, K);
  regularise(factor.lower, space.gram, ridge, false);
  if (!cholesky(factor, arena)) return kNotPositiveDefinite;
  invert(factor, inverse, arena);

  // Vectors of length K with their padding at zero, so that dot products run over whole vectors.
  const Matrix<T> vectors = take_matrix<T>(arena, 8, K);
  fill_zero(vectors);
  T *a = vectors.row(0), *c = vectors.row(1), *p = vectors.row(2), *q = vectors.row(3), *e = vectors.row(4),
    *f = vectors.row(5), *w = vectors.row(6), *next_a = vectors.row(7);
  clear_padding(inverse);
  for (int64_t t = 0; t < space.weights.rows; ++t) {
    if (!args.posterior.seen(b, first + t)) continue;
    const T* x = space.cross.row(t);
    update_and_multiply<2>(inverse, padded, {p, q}, {e, f}, x, w);
    update_and_multiply<1>(space.cov, padded, {a}, {c}, w, next_a);
    std::swap(a, next_a);
    __builtin_memcpy(space.weights.row(t), w, static_cast<size_t>(K) * sizeof(T));

    const T s = dot(padded, w, a) + *args.posterior.noise_var.at(b, first + t);
    for (int64_t i = 0; i < padded; ++i) c[i] = a[i] / s;
    const T d = space.inner.row(t)[t] - dot(padded, w, x) - ridge * dot(padded, w, w);
    multiply_two(inverse, padded, c, w, p, q);

    const T n11 = dot(padded, c, p), n12 = dot(padded, c, q) + 1 / ridge, n22 = dot(padded, w, q) - d / (ridge * ridge);
    const T determinant = n11 * n22 - n12 * n12;
    for (int64_t i = 0; i < padded; ++i) {
      e[i] = (n22 * p[i] - n12 * q[i]) / determinant;
      f[i] = (n11 * q[i] - n12 * p[i]) / determinant;
    }
    advance_cross(space, t, w, c, padded);
  }
  return kGood;
}

// Any other solve factors afresh: for each pattern and each of its iterations the matrix is that of the mean which the
// previous weights would give, G + c rᵀ + r cᵀ + d c cᵀ with r = X_t − G w = R δ; the pattern is then written from the
// mean before it.
template <class T>
Status find_weights_afresh(const GramSpace<T>& space, const WritingArgs<T>& args, int64_t b, int64_t first,
                           Arena& arena) {
  const PosteriorArgs<T>& shared = args.posterior;
  const int64_t K = shared.K, padded = round_up(K, kLanes<T>);
  const T ridge = *args.ridge.at(b);
  const Factor<T> factor = take_factor<T>(arena, K);
  const Matrix<T> lower_transposed = take_matrix<T>(arena, K, K), gram = take_matrix<T>(arena, K, K);
  const Matrix<T> work = take_matrix<T>(arena, 1, kBlock), vectors = take_matrix<T>(arena, 5, K);
  fill_zero(vectors);
  T *target = vectors.row(0), *a = vectors.row(1), *c = vectors.row(2), *r = vectors.row(3);
  const Matrix<T> w = vectors.rows_from(4, 1);
  const auto multiply = [&](const Matrix<T>& m, const T* x, T* y) {
    product<Into::kSet>(Matrix<T>{y, 1, K, vectors.ld}, K, Left<T>{x, 0, 1}, m);
    for (int64_t i = K; i < padded; ++i) y[i] = 0;
  };
  // m ← m + c rᵀ + r cᵀ + d c cᵀ
  const auto move = [&](const Matrix<T>& m, T d) {
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < K; ++j) m.row(i)[j] += c[i] * r[j] + r[i] * c[j] + d * c[i] * c[j];
  };
  Status status = kGood;
  for (int64_t t = 0; t < space.weights.rows; ++t) {
    if (!shared.seen(b, first + t)) continue;
    const T* x = space.cross.row(t);
    T d = 0, along = 0;
    for (int64_t n = 0; n < args.num_opt_iters; ++n) {
      copy_rows(gram, space.gram);
      __builtin_memcpy(target, x, static_cast<size_t>(K) * sizeof(T));
      if (n > 0) {
        move(gram, d);
        for (int64_t i = 0; i < K; ++i) target[i] += along * c[i];
      }
      regularise(factor.lower, gram, ridge, args.squared_gram);
      if (!cholesky(factor, arena)) status = kNotPositiveDefinite;
      transpose(lower_transposed, factor.lower);
      if (args.squared_gram)
        multiply(gram, target, w.data);
      else
        __builtin_memcpy(w.data, target, static_cast<size_t>(K) * sizeof(T));
      solve_rows(factor, lower_transposed, w, work);
      for (int64_t i = K; i < padded; ++i) w.data[i] = 0;

      multiply(space.cov, w.data, a);
      const T s = dot(padded, w.data, a) + *shared.noise_var.at(b, first + t);
      for (int64_t i = 0; i < padded; ++i) c[i] = a[i] / s;
      multiply(space.gram, w.data, r);
      along = space.inner.row(t)[t] - dot(padded, w.data, x);
      d = along - dot(padded, w.data, x) + dot(padded, w.data, r);
      for (int64_t i = 0; i < K; ++i) r[i] = x[i] - r[i];
    }
    __builtin_memcpy(space.weights.row(t), w.data, static_cast<size_t>(K) * sizeof(T));
    move(space.gram, d);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < K; ++j) space.cov.row(i)[j] -= a[i] * c[j];
    advance_cross(space, t, w.data, c, padded);
  }
  return status;
}

// Find the weights of one chunk, whose patterns stand below the mean in `stacked`: Y = [R; Z].
template <class T>
Status address_chunk(const WritingArgs<T>& args, const Memory<T>& memory, const Matrix<T>& stacked,
                     const Matrix<T>& weights, int64_t b, int64_t first, Arena& arena) {
  const int64_t K = args.posterior.K, count = weights.rows, both = stacked.rows;
  const Matrix<T> stacked_transposed = take_matrix<T>(arena, stacked.columns, both);
  const Matrix<T> products = take_matrix<T>(arena, both, both);  // Y Yᵀ = [G Xᵀ; X Q]
  transpose(stacked_transposed, stacked);
  product_lower<Into::kSet>(products, stacked.columns, left(stacked), stacked_transposed);
  const GramSpace<T> space{.gram = take_matrix<T>(arena, K, K),
                           .cross = take_matrix<T>(arena, count, K),
                           .inner = products.block(K, count, K, count),
                           .cov = take_matrix<T>(arena, K, K),
                           .weights = weights};
  copy_rows(space.gram, products.block(0, K, 0, K));
  mirror(space.gram);
  copy_rows(space.cross, products.block(K, count, 0, K));
  copy_rows(space.cov, memory.cov);
  for (const Matrix<T>& m : {space.gram, space.cross, space.cov}) clear_padding(m);
  fill_zero(weights);
  return args.num_opt_iters == 1 && !args.squared_gram ? find_weights(space, args, b, first, arena)
                                                       : find_weights_afresh(space, args, b, first, arena);
}

template <class T>
void write(const WritingArgs<T>& args, int64_t begin, int64_t end) {
  const PosteriorArgs<T>& shared = args.posterior;
  const int64_t K = shared.K, C = shared.C, patterns = shared.T_, most = smaller(kChunk, patterns);
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Matrix<T> stacked = take_matrix<T>(arena, K + most, C), all_weights = take_matrix<T>(arena, most, K);
    const Memory<T> memory{stacked.rows_from(0, K), take_matrix<T>(arena, K, K)};
    Status status = load_memory(memory, shared, b);
    T log_evidence = 0;
    const Arena::Mark chunk_start = arena.mark();
    for (int64_t first = 0; first < patterns; first += kChunk) {
      arena.release(chunk_start);
      const int64_t count = smaller(kChunk, patterns - first);
      const Matrix<T> values = stacked.rows_from(K, count), weights = all_weights.rows_from(0, count);
      load_patterns(values, shared.values, shared, b, first);
      const Status found = address_chunk(args, memory, stacked.rows_from(0, K + count), weights, b, first, arena);
      const Status updated = condition(memory, weights, values, shared, b, first, log_evidence, arena);
      store_matrix(args.new_weights.from_row(first), b, weights);
      if (status == kGood) status = found > updated ? found : updated;
    }
    store_memory(memory, shared, b);
    shared.info[b] = status;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
