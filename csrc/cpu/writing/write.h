// The write: find the weights of a chunk of patterns in Gram space, then condition on all of them at once.
//
// Each pattern's weights depend on what was written before it, but only through inner products. With A = R Rᵀ + λI,
// X = Z Rᵀ and Q = Z Zᵀ the search lives in K and T; the codes themselves are needed twice a chunk, for one Gram
// product before it and for the block update after it. Starting each chunk from the mean itself keeps the cost linear
// in T, and keeps rounding from adding up over a long stream.
#pragma once

#include <array>
#include <utility>

#include "cpu/posterior/update.h"
#include "cpu/reading/read.h"

namespace fastkm::FASTKM_LEVEL {

// Patterns whose weights are found before the mean is moved. A chunk costs a Gram product, a factor and an inverse, and
// each of its patterns a correction for those before it.
constexpr int64_t kLargestSearchChunk = 2 * kChunk;
inline int64_t search_chunk(int64_t K) { return K < 128 ? kChunk : kLargestSearchChunk; }

// What the search for the weights needs, kept up to date with what was written.
template <class T>
struct GramSpace {
  Matrix<T> gram;     // G = R Rᵀ [K, K]
  Matrix<T> cross;    // X = Z Rᵀ [T, K]
  Matrix<T> inner;    // Q = Z Zᵀ [T, T], lower triangle
  Matrix<T> cov;      // U [K, K]
  Matrix<T> weights;  // [T, K], out
};

// y (=, −=) Mᵀ x for the first `rows` rows of M and each of N vectors; `padded` columns.
template <Into INTO, size_t N, class T>
void combine(const Matrix<T>& m, int64_t rows, int64_t padded, const std::array<const T*, N>& x,
             const std::array<T*, N>& y) {
  constexpr int64_t W = kLanes<T>;
  int64_t j = 0;
  // Enough sums in flight to hide the latency of an addition: rows are dealt out to PARTS of them.
  const auto pass = [&]<int VECS, int PARTS>() {
    Vec<T> sum[PARTS][N][VECS] = {};
    const auto add = [&](int part, int64_t i) {
      const T* row = m.row(i) + j;
      Vec<T> entry[VECS];
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) entry[v] = load(row + v * W);
#pragma GCC unroll 2
      for (size_t n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) sum[part][n][v] += x[n][i] * entry[v];
    };
    int64_t i = 0;
    for (; i + PARTS <= rows; i += PARTS)
#pragma GCC unroll 4
      for (int part = 0; part < PARTS; ++part) add(part, i + part);
    for (; i < rows; ++i) add(0, i);
#pragma GCC unroll 2
    for (size_t n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
#pragma GCC unroll 4
        for (int part = 1; part < PARTS; ++part) sum[0][n][v] += sum[part][n][v];
        T* at = y[n] + j + v * W;
        store<T>(at, INTO == Into::kSubtract ? load(at) - sum[0][n][v] : sum[0][n][v]);
      }
  };
  for (; j + 4 * W <= padded; j += 4 * W) pass.template operator()<4, 2 / N>();
  for (; j + 2 * W <= padded; j += 2 * W) pass.template operator()<2, 4 / N>();
  for (; j < padded; j += W) pass.template operator()<1, 4>();
}

// y = M x for a symmetric M.
template <class T>
void multiply(const Matrix<T>& m, int64_t padded, const T* x, T* y) {
  combine<Into::kSet, 1>(m, m.rows, padded, {x}, {y});
}

// y = M x for the first `rows` rows of M, which has more, up to a whole vector; `padded` columns.
template <class T>
void dots(const Matrix<T>& m, int64_t rows, int64_t padded, const T* x, T* y) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t i = 0; i < rows; i += W) {
    Vec<T> sum[W] = {};
    for (int64_t j = 0; j < padded; j += W) {
      const Vec<T> entry = load(x + j);
#pragma GCC unroll 16
      for (int64_t row = 0; row < W; ++row) sum[row] += load(m.row(i + row) + j) * entry;
    }
    store<T>(y + i, lane_sums<T>(sum));
  }
}

// A symmetric matrix and what was taken from it since, of low rank: M = base − Σ_j l_j r_jᵀ. Products with it read the
// base and never write it; changes cost what their rank costs.
template <class T>
struct Downdated {
  Matrix<T> base;         // [K, K], or of no rows: then it is zero
  Matrix<T> left, right;  // [changes, K]
  Matrix<T> along;        // [2, changes], l_j · x of the last product
  int64_t count = 0;

  void subtract(const T* l, const T* r) {
    const size_t bytes = static_cast<size_t>(round_up(right.columns, kLanes<T>)) * sizeof(T);
    __builtin_memcpy(left.row(count), l, bytes);
    __builtin_memcpy(right.row(count++), r, bytes);
  }

  // y −= Σ_j r_j (l_j · x), all that changed since.
  template <size_t N>
  void correct(int64_t padded, const std::array<const T*, N>& x, const std::array<T*, N>& y) const {
    std::array<const T*, N> factors;
    for (size_t n = 0; n < N; ++n) {
      dots(left, count, padded, x[n], along.row(n));
      factors[n] = along.row(n);
    }
    combine<Into::kSubtract, N>(right, count, padded, factors, y);
  }

  // y = M x
  template <size_t N>
  void multiply(int64_t padded, const std::array<const T*, N>& x, const std::array<T*, N>& y) const {
    combine<Into::kSet, N>(base, base.rows, padded, x, y);
    correct<N>(padded, x, y);
  }
};

template <class T>
Downdated<T> take_downdated(const Matrix<T>& base, int64_t K, int64_t changes, Arena& arena) {
  const int64_t rows = round_up(changes, kLanes<T>);
  const Downdated<T> m{base, take_matrix<T>(arena, rows, K), take_matrix<T>(arena, rows, K),
                       take_matrix<T>(arena, 2, rows)};
  fill_zero(m.left);  // dots go over whole vectors of rows
  return m;
}

// The search as it went, for what conditions on it and for its backward. Rows are patterns, those of masked ones zero.
template <class T>
struct Search {
  Downdated<T> inverse;  // H = A⁻¹: by p eᵀ + q fᵀ a pattern that is seen
  Downdated<T> cov;      // U: by c aᵀ, row for row
  Matrix<T> past;        // [t, t], c_earlier · w_t
  Matrix<T> along;       // [t, t], δ_t · z_later
  T s[kLargestSearchChunk] = {}, d[kLargestSearchChunk] = {};
};

// The patterns still to come, after one with weights w moved the mean by c δᵀ: x ← x + c (δ · z). With `solved`, rows
// A⁻¹ x with the A that the chunk began with follow: by `solved_c`, that of c.
template <class T>
void advance_cross(const GramSpace<T>& space, int64_t t, const T* w, const T* c, int64_t padded, T* told_along,
                   const Matrix<T>* solved = nullptr, const T* solved_c = nullptr) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t later = t + 1; later < space.cross.rows; ++later) {
    T* x = space.cross.row(later);
    const T along = space.inner.row(later)[t] - dot(padded, w, x);
    for (int64_t i = 0; i < padded; i += W) store<T>(x + i, load(x + i) + along * load(c + i));
    if (told_along) told_along[later] = along;
    if (!solved) continue;
    T* h = solved->row(later);
    for (int64_t i = 0; i < padded; i += W) store<T>(h + i, load(h + i) + along * load(solved_c + i));
  }
}

// The ridge solve, once a pattern. With w exact, R δ = λ w, so A changes by [c w] [[d, λ], [λ, 0]] [c w]ᵀ, and its
// inverse H by Woodbury: H −= [p q] N⁻¹ [p q]ᵀ with p = H c, q = H w, N = [[d, λ], [λ, 0]]⁻¹ + [c w]ᵀ H [c w]. What H
// has lost to rounding, one step of refinement against A gives back to w. One factorisation a chunk, and no matrix is
// written after it: a pattern reads H twice, A and U once.
template <class T>
Status find_weights(const GramSpace<T>& space, const WritingArgs<T>& args, int64_t b, int64_t first, Search<T>& search,
                    Arena& arena) {
  const int64_t K = args.posterior.K, padded = round_up(K, kLanes<T>), count = space.weights.rows;
  const T ridge = *args.ridge.at(b);
  const Matrix<T>& inverse = search.inverse.base;
  const Matrix<T>& system = space.gram;  // A = G + λI, as the chunk found it
  const Factor<T> factor = take_factor<T>(arena, K);
  for (int64_t i = 0; i < K; ++i) system.row(i)[i] += ridge;
  copy_rows(factor.lower, system);
  if (!cholesky(factor, arena)) return kNotPositiveDefinite;
  invert(factor, inverse, arena);
  clear_padding(inverse);
  Downdated<T> now = take_downdated<T>(system, K, 2 * count, arena);
  const Matrix<T> solved = take_matrix<T>(arena, count, K);  // A⁻¹ x of every pattern, with the first A
  product<Into::kSet>(solved, K, left(space.cross), inverse);

  // Vectors of length K with their padding at zero, so that dot products run over whole vectors.
  const Matrix<T> vectors = take_matrix<T>(arena, 6, K);
  fill_zero(vectors);
  T *w = vectors.row(0), *p = vectors.row(1), *q = vectors.row(2), *e = vectors.row(3), *f = vectors.row(4),
    *residual = vectors.row(5);
  for (int64_t t = 0; t < count; ++t) {
    if (!args.posterior.seen(b, first + t)) continue;
    const T* x = space.cross.row(t);
    T *c = search.cov.left.row(t), *a = search.cov.right.row(t);
    __builtin_memcpy(w, solved.row(t), static_cast<size_t>(K) * sizeof(T));
    search.inverse.template correct<1>(padded, {x}, {w});
    now.template multiply<1>(padded, {w}, {residual});
    for (int64_t i = 0; i < padded; ++i) residual[i] = x[i] - residual[i];
    search.inverse.template multiply<1>(padded, {residual}, {p});
    for (int64_t i = 0; i < padded; ++i) w[i] += p[i];
    search.cov.count = t;
    search.cov.template multiply<1>(padded, {w}, {a});
    __builtin_memcpy(space.weights.row(t), w, static_cast<size_t>(K) * sizeof(T));
    __builtin_memcpy(search.past.row(t), search.cov.along.row(0), static_cast<size_t>(t) * sizeof(T));

    const T s = dot(padded, w, a) + *args.posterior.noise_var.at(b, first + t), reciprocal = 1 / s;
    for (int64_t i = 0; i < padded; ++i) c[i] = a[i] * reciprocal;
    const T d = space.inner.row(t)[t] - dot(padded, w, x) - ridge * dot(padded, w, w);
    search.s[t] = s;
    search.d[t] = d;
    combine<Into::kSet, 2>(inverse, K, padded, {c, w}, {p, q});
    advance_cross(space, t, w, c, padded, search.along.row(t), &solved, p);
    search.inverse.template correct<2>(padded, {c, w}, {p, q});

    const T n11 = dot(padded, c, p), n12 = dot(padded, c, q) + 1 / ridge, n22 = dot(padded, w, q) - d / (ridge * ridge);
    const T scale = 1 / (n11 * n22 - n12 * n12);
    for (int64_t i = 0; i < padded; ++i) {
      e[i] = (n22 * p[i] - n12 * q[i]) * scale;
      f[i] = (n11 * q[i] - n12 * p[i]) * scale;
    }
    search.inverse.subtract(p, e);
    search.inverse.subtract(q, f);
    for (int64_t i = 0; i < padded; ++i) {
      e[i] = -ridge * w[i] - d * c[i];
      f[i] = -ridge * c[i];
    }
    now.subtract(c, e);
    now.subtract(w, f);
  }
  return kGood;
}

template <class T>
Search<T> take_search(const GramSpace<T>& space, Arena& arena) {
  const int64_t K = space.cov.rows, count = space.weights.rows;
  const Matrix<T> inverse = take_matrix<T>(arena, K, K);
  const Downdated<T> cov = take_downdated<T>(space.cov, K, count, arena);
  const Matrix<T> past = take_matrix<T>(arena, count, count);
  for (const Matrix<T>* m : {&cov.right, &past}) fill_zero(*m);
  return {.inverse = take_downdated<T>(inverse, K, 2 * count, arena),
          .cov = cov,
          .past = past,
          .along = take_matrix<T>(arena, count, count)};
}

// One solve of a pattern, and the change of the mean that its weights would make: R + c δᵀ.
template <class T>
struct Attempt {
  T *w, *a, *c, *g, *r;  // [K]: weights, U w, a/s, G w, R δ = x − G w
  T s, along, d;         // innovation variance, δ·z, δ·δ
};

template <class T>
Attempt<T> take_attempt(int64_t K, Arena& arena) {
  const Matrix<T> vectors = take_matrix<T>(arena, 5, K);
  fill_zero(vectors);
  return {vectors.row(0), vectors.row(1), vectors.row(2), vectors.row(3), vectors.row(4), 0, 0, 0};
}

// M += c rᵀ + r cᵀ + d c cᵀ: what the attempt does to the Gram matrix.
template <class T>
void move_gram(const Matrix<T>& m, const Attempt<T>& by, T sign) {
  for (int64_t i = 0; i < m.rows; ++i) {
    const T of_c = sign * by.c[i], of_r = sign * (by.r[i] + by.d * by.c[i]);
    for (int64_t j = 0; j < m.rows; ++j) m.row(i)[j] += of_c * by.r[j] + of_r * by.c[j];
  }
}

// Solves that factor afresh: needed for the squared-Gram solve, and when a pattern is solved more than once, each time
// against the mean that the attempt before would give.
template <class T>
struct AfreshSolver {
  const GramSpace<T>& space;
  const WritingArgs<T>& args;
  const int64_t K, padded;
  const T ridge;
  const Factor<T> factor;
  const Matrix<T> lower_transposed, gram, work, target;

  AfreshSolver(const GramSpace<T>& space, const WritingArgs<T>& args, T ridge, Arena& arena)
      : space(space),
        args(args),
        K(args.posterior.K),
        padded(round_up(K, kLanes<T>)),
        ridge(ridge),
        factor(take_factor<T>(arena, K)),
        lower_transposed(take_matrix<T>(arena, K, K)),
        gram(take_matrix<T>(arena, K, K)),
        work(take_matrix<T>(arena, 1, kBlock)),
        target(take_matrix<T>(arena, 2, K)) {
    fill_zero(target);
  }

  // Factor the matrix of the next attempt: its Gram matrix in `gram`, its x in row 0 of `target`.
  bool prepare(const T* x, const Attempt<T>* before, Arena& arena) const {
    copy_rows(gram, space.gram);
    __builtin_memcpy(target.data, x, static_cast<size_t>(padded) * sizeof(T));
    if (before) {
      move_gram(gram, *before, T(1));
      for (int64_t i = 0; i < padded; ++i) target.data[i] += before->along * before->c[i];
    }
    regularise(factor.lower, gram, ridge, args.squared_gram);
    const bool good = cholesky(factor, arena);
    transpose(lower_transposed, factor.lower);
    return good;
  }

  // y ← A⁻¹ y, or (G² + λI)⁻¹ y.
  void solve(T* y) const {
    solve_rows(factor, lower_transposed, Matrix<T>{y, 1, K, target.ld}, work);
    for (int64_t i = K; i < target.ld; ++i) y[i] = 0;
  }

  bool attempt(int64_t t, T noise, const Attempt<T>* before, Attempt<T>& out, Arena& arena) const {
    const T* x = space.cross.row(t);
    const bool good = prepare(x, before, arena);
    if (args.squared_gram)
      multiply(gram, padded, target.data, out.w);
    else
      __builtin_memcpy(out.w, target.data, static_cast<size_t>(padded) * sizeof(T));
    solve(out.w);
    multiply(space.cov, padded, out.w, out.a);
    multiply(space.gram, padded, out.w, out.g);
    out.s = dot(padded, out.w, out.a) + noise;
    out.along = space.inner.row(t)[t] - dot(padded, out.w, x);
    out.d = out.along - dot(padded, out.w, x) + dot(padded, out.w, out.g);
    for (int64_t i = 0; i < padded; ++i) {
      out.c[i] = out.a[i] / out.s;
      out.r[i] = x[i] - out.g[i];
    }
    return good;
  }

  // The last attempt is written: G and U move on; and back, when that is undone.
  void write(const Attempt<T>& last) const { move(last, T(1)); }
  void undo(const Attempt<T>& last) const { move(last, T(-1)); }

 private:
  void move(const Attempt<T>& last, T sign) const {
    move_gram(space.gram, last, sign);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < K; ++j) space.cov.row(i)[j] -= sign * last.a[i] * last.c[j];
  }
};

// What is needed to undo each pattern; rows are patterns.
template <class T>
struct AfreshTape {
  Matrix<T> a, c, r;  // [t, K], of the last attempt
  Matrix<T> along;    // [t, t]
  T d[kChunk];

  Attempt<T> written(int64_t t, const Matrix<T>& weights) const {
    return {
        .w = weights.row(t), .a = a.row(t), .c = c.row(t), .g = nullptr, .r = r.row(t), .s = 0, .along = 0, .d = d[t]};
  }
};

template <class T>
AfreshTape<T> take_afresh_tape(int64_t K, int64_t count, Arena& arena) {
  return {take_matrix<T>(arena, count, K), take_matrix<T>(arena, count, K), take_matrix<T>(arena, count, K),
          take_matrix<T>(arena, count, count)};
}

template <class T>
Status find_weights_afresh(const GramSpace<T>& space, const WritingArgs<T>& args, int64_t b, int64_t first,
                           Arena& arena, AfreshTape<T>* tape = nullptr) {
  const AfreshSolver<T> solver(space, args, *args.ridge.at(b), arena);
  Attempt<T> now = take_attempt<T>(solver.K, arena), before = take_attempt<T>(solver.K, arena);
  const Arena::Mark step_start = arena.mark();
  Status status = kGood;
  for (int64_t t = 0; t < space.weights.rows; ++t) {
    if (!args.posterior.seen(b, first + t)) continue;
    const T noise = *args.posterior.noise_var.at(b, first + t);
    for (int64_t n = 0; n < args.num_opt_iters; ++n) {
      arena.release(step_start);
      std::swap(now, before);
      if (!solver.attempt(t, noise, n > 0 ? &before : nullptr, now, arena)) status = kNotPositiveDefinite;
    }
    __builtin_memcpy(space.weights.row(t), now.w, static_cast<size_t>(solver.K) * sizeof(T));
    solver.write(now);
    advance_cross(space, t, now.w, now.c, solver.padded, tape ? tape->along.row(t) : nullptr);
    if (!tape) continue;
    __builtin_memcpy(tape->a.row(t), now.a, static_cast<size_t>(solver.padded) * sizeof(T));
    __builtin_memcpy(tape->c.row(t), now.c, static_cast<size_t>(solver.padded) * sizeof(T));
    __builtin_memcpy(tape->r.row(t), now.r, static_cast<size_t>(solver.padded) * sizeof(T));
    tape->d[t] = now.d;
  }
  return status;
}

template <class T>
bool factors_once(const WritingArgs<T>& args) {
  return args.num_opt_iters == 1 && !args.squared_gram;
}

// The inner products of one chunk, whose patterns stand below the mean in `stacked`: Y = [R; Z]. `own`: G and U are
// copies, for the search that factors afresh writes to them.
template <class T>
GramSpace<T> take_gram_space(const Memory<T>& memory, const Matrix<T>& stacked, const Matrix<T>& weights, bool own,
                             Arena& arena) {
  const int64_t K = memory.cov.rows, count = weights.rows, both = stacked.rows;
  const Matrix<T> stacked_transposed = take_matrix<T>(arena, stacked.columns, both);
  const Matrix<T> products = take_matrix<T>(arena, both, both);  // Y Yᵀ = [G Xᵀ; X Q]
  transpose(stacked_transposed, stacked);
  product_lower<Into::kSet>(products, stacked.columns, left(stacked), stacked_transposed);
  const Matrix<T> gram = products.block(0, K, 0, K), cross = products.block(K, count, 0, K);
  mirror(gram);
  const auto copy = [&](const Matrix<T>& from) {
    const Matrix<T> to = take_matrix<T>(arena, from.rows, K);
    copy_rows(to, from);
    return to;
  };
  const GramSpace<T> space{.gram = own ? copy(gram) : gram,
                           .cross = copy(cross),
                           .inner = products.block(K, count, K, count),
                           .cov = own ? copy(memory.cov) : memory.cov,
                           .weights = weights};
  for (const Matrix<T>* m : {&space.gram, &space.cross, &space.cov}) clear_padding(*m);
  fill_zero(weights);
  return space;
}

// What conditioning on the weights of a search needs is known from it: with L̃ the c_earlier · w_t and a unit diagonal,
// S = L Lᵀ for L = L̃ diag(√s), and G = L⁻¹ W U has the rows a/√s.
template <class T>
Chunk<T> whiten_found(const Memory<T>& memory, const Search<T>& search, int64_t from, const Matrix<T>& weights,
                      const Matrix<T>& values, const PosteriorArgs<T>& args, int64_t b, int64_t first, Arena& arena) {
  const int64_t count = weights.rows;
  Chunk<T> chunk = take_chunk(args, count, arena);
  const Factor<T> factor = take_factor<T>(arena, count);
  T root[kChunk];
  for (int64_t t = 0; t < count; ++t) {
    const T noise = chunk.noise[t] = *args.noise_var.at(b, first + t);
    T s = args.seen(b, first + t) ? search.s[from + t] : noise;
    const T slack = slack_of(args.K, count, s);
    chunk.good &= admit(s, Floors<T>{&noise, &slack}, 0);
    chunk.pivot[t] = s;
    root[t] = std::sqrt(s);
    const T reciprocal = 1 / root[t];
    T *lower = factor.lower.row(t), *gain = chunk.gain.row(t);
    const T *past = search.past.row(from + t) + from, *a = search.cov.right.row(from + t);
    for (int64_t j = 0; j < t; ++j) lower[j] = past[j] * root[j];
    lower[t] = root[t];
    for (int64_t k = 0; k < chunk.gain.ld; ++k) gain[k] = a[k] * reciprocal;
  }
  invert_block(factor);
  whiten_values(chunk, factor, memory.mean, weights, values, arena);
  return chunk;
}

// Find the weights of a chunk of patterns, which stand below the mean in `stacked`, and condition on them.
template <class T>
Status write_chunk(const WritingArgs<T>& args, const Memory<T>& memory, const Matrix<T>& stacked,
                   const Matrix<T>& weights, int64_t b, int64_t first, double& log_evidence, Arena& arena) {
  const PosteriorArgs<T>& shared = args.posterior;
  const int64_t count = weights.rows;
  const bool once = factors_once(args);
  const GramSpace<T> space = take_gram_space(memory, stacked, weights, !once, arena);
  Search<T> search = once ? take_search(space, arena) : Search<T>{};
  Status status =
      once ? find_weights(space, args, b, first, search, arena) : find_weights_afresh(space, args, b, first, arena);
  const Arena::Mark searched = arena.mark();
  for (int64_t t = 0; t < count; t += kChunk) {
    arena.release(searched);
    const int64_t now = smaller(kChunk, count - t);
    const Matrix<T> found = weights.rows_from(t, now), values = stacked.rows_from(args.posterior.K + t, now);
    const Chunk<T> chunk = once ? whiten_found(memory, search, t, found, values, shared, b, first + t, arena)
                                : whiten(memory, found, values, shared, b, first + t, arena);
    const Status updated = condition(memory, chunk, memory, shared, b, first + t, log_evidence);
    status = status > updated ? status : updated;
  }
  return status;
}

template <class T>
void write(const WritingArgs<T>& args, int64_t begin, int64_t end) {
  const PosteriorArgs<T>& shared = args.posterior;
  const int64_t K = shared.K, size = search_chunk(K), most = smaller(size, shared.T_);
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Matrix<T> stacked = take_matrix<T>(arena, K + most, shared.C), all_weights = take_matrix<T>(arena, most, K);
    const Memory<T> memory{stacked.rows_from(0, K), take_matrix<T>(arena, K, K)};
    Status status = load_memory(memory, shared, b);
    double log_evidence = 0;
    const Arena::Mark chunk_start = arena.mark();
    for (int64_t first = 0; first < shared.T_; first += size) {
      arena.release(chunk_start);
      const int64_t count = smaller(size, shared.T_ - first);
      const Matrix<T> weights = all_weights.rows_from(0, count);
      load_patterns(stacked.rows_from(K, count), shared.values, shared, b, first);
      const Matrix<T> both = stacked.rows_from(0, K + count);
      const Status done = write_chunk(args, memory, both, weights, b, first, log_evidence, arena);
      store_matrix(args.new_weights.from_row(first), b, weights);
      if (status == kGood) status = done;
    }
    store_memory(memory, shared, b);
    shared.info[b] = status;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
