// Backward of the write: through the block update to the weights, then back through the search that found them.
//
// The search is undone pattern by pattern in K and T. Its cotangents of G, X and Q become those of the codes in one
// product at the end of a chunk.
#pragma once

#include "cpu/posterior/update_backward.h"
#include "cpu/writing/write.h"

namespace fastkm::FASTKM_LEVEL {

// Cotangents of a chunk's inner products and of what else the search reads.
template <class T>
struct SearchCotangents {
  Matrix<T> weights;  // [t, K], in
  Matrix<T> gram;     // [K, K], symmetric
  Matrix<T> cross;    // [t, K]
  Matrix<T> inner;    // [t, t], lower triangle
  Matrix<T> cov;      // [K, K], symmetric
  T* noise;           // [t], added to
  T ridge = 0;
};

template <class T>
void add_scaled(int64_t padded, T* to, T factor, const T* from) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t i = 0; i < padded; i += W) store<T>(to + i, load(to + i) + factor * load(from + i));
}

// M += (x yᵀ + y xᵀ) / 2 for two vectors.
template <class T>
void add_symmetric_outer(const Matrix<T>& m, T factor, const T* x, const T* y) {
  for (int64_t i = 0; i < m.rows; ++i) {
    const T of_y = T(0.5) * factor * x[i], of_x = T(0.5) * factor * y[i];
    for (int64_t j = 0; j < m.rows; ++j) m.row(i)[j] += of_y * y[j] + of_x * x[j];
  }
}

// Undo x ← x + along c for the patterns after t, and gather what they say of w and c.
template <class T>
void retreat_cross(const GramSpace<T>& space, const SearchCotangents<T>& bar, int64_t t, const T* along, const T* w,
                   const T* c, T* w_bar, T* c_bar, int64_t padded) {
  for (int64_t later = t + 1; later < space.cross.rows; ++later) {
    T *x = space.cross.row(later), *x_bar = bar.cross.row(later);
    const T of_along = dot(padded, c, x_bar);
    add_scaled(padded, x, -along[later], c);
    add_scaled(padded, c_bar, along[later], x_bar);
    add_scaled(padded, w_bar, -of_along, x);
    add_scaled(padded, x_bar, -of_along, w);
    bar.inner.row(later)[t] += of_along;
  }
}

// Reverse of find_weights. Nothing has to be undone but x: each pattern takes from H and U what those before it
// changed, and the cotangents of A and U are of low rank until they are wanted.
template <class T>
void find_weights_backward(const GramSpace<T>& space, Search<T>& search, const WritingArgs<T>& args, int64_t b,
                           int64_t first, SearchCotangents<T>& bar, Arena& arena) {
  const int64_t K = args.posterior.K, padded = round_up(K, kLanes<T>), count = space.weights.rows;
  const T ridge = *args.ridge.at(b);
  const Matrix<T> none{nullptr, 0, K, 0};
  Downdated<T> gram_bar = take_downdated<T>(none, K, 2 * count, arena);
  Downdated<T> cov_bar = take_downdated<T>(none, K, 2 * count, arena);
  const Matrix<T> vectors = take_matrix<T>(arena, 10, K);
  fill_zero(vectors);
  int next = 0;
  const auto vector = [&] { return vectors.row(next++); };
  T *w = vector(), *w_bar = vector(), *a_bar = vector(), *c_bar = vector(), *moved = vector();
  T *gram_w = vector(), *gram_c = vector(), *cov_c = vector(), *v = vector();
  for (int64_t t = count - 1; t >= 0; --t) {
    if (!args.posterior.seen(b, first + t)) continue;
    search.cov.count = t;
    search.inverse.count -= 2;
    const T *c = search.cov.left.row(t), *a = search.cov.right.row(t), *x = space.cross.row(t);
    const T s = search.s[t], d = search.d[t];
    T* x_bar = bar.cross.row(t);
    __builtin_memcpy(w, space.weights.row(t), static_cast<size_t>(K) * sizeof(T));
    __builtin_memcpy(w_bar, bar.weights.row(t), static_cast<size_t>(K) * sizeof(T));

    // Through A' = A + λ (c wᵀ + w cᵀ) + d c cᵀ and U' = U − a cᵀ.
    gram_bar.template multiply<2>(padded, {w, c}, {gram_w, gram_c});
    cov_bar.template multiply<1>(padded, {c}, {cov_c});
    const T d_bar = dot(padded, c, gram_c);
    for (int64_t i = 0; i < padded; ++i) {
      c_bar[i] = 2 * ridge * gram_w[i] + 2 * d * gram_c[i] - s * cov_c[i];
      w_bar[i] += 2 * ridge * gram_c[i] - d_bar * (x[i] + 2 * ridge * w[i]);
      x_bar[i] -= d_bar * w[i];
    }
    bar.ridge += 2 * dot(padded, c, gram_w) - d_bar * dot(padded, w, w);
    bar.inner.row(t)[t] += d_bar;
    retreat_cross(space, bar, t, search.along.row(t), w, c, w_bar, c_bar, padded);

    // Through c = a/s, s = w·a + σ² and a = U w.
    const T s_bar = -dot(padded, c_bar, c) / s;
    for (int64_t i = 0; i < padded; ++i) a_bar[i] = c_bar[i] / s - cov_c[i] + s_bar * w[i];
    bar.noise[t] += s_bar;
    search.cov.template multiply<1>(padded, {a_bar}, {moved});
    for (int64_t i = 0; i < padded; ++i) w_bar[i] += s_bar * a[i] + moved[i];

    // Through w = A⁻¹ x: Ū += sym(ā wᵀ), Ā −= sym(v wᵀ).
    search.inverse.template multiply<1>(padded, {w_bar}, {v});
    for (int64_t i = 0; i < padded; ++i) {
      x_bar[i] += v[i];
      v[i] *= T(0.5);
      a_bar[i] *= T(-0.5);
    }
    gram_bar.subtract(v, w);
    gram_bar.subtract(w, v);
    cov_bar.subtract(a_bar, w);
    cov_bar.subtract(w, a_bar);
  }
  product<Into::kSubtract>(bar.gram, gram_bar.count, transposed(gram_bar.left), gram_bar.right);
  product<Into::kSubtract>(bar.cov, cov_bar.count, transposed(cov_bar.left), cov_bar.right);
  for (int64_t k = 0; k < K; ++k) bar.ridge += bar.gram.row(k)[k];
}

// Reverse of one attempt. Takes the cotangents of its w, a, c, r, along and d, adds those of G, U, x, Q and λ, and
// leaves those of the matrix and vector it solved with in `gram_bar` and `x_bar`.
template <class T>
struct AttemptCotangents {
  T *w, *a, *c, *r;  // [K]
  T along = 0, d = 0;
};

template <class T>
void attempt_backward(const AfreshSolver<T>& solver, int64_t t, const Attempt<T>& made, const Attempt<T>* before,
                      AttemptCotangents<T>& of, SearchCotangents<T>& bar, const Matrix<T>& gram_bar, T* solved_x_bar,
                      Arena& arena) {
  const GramSpace<T>& space = solver.space;
  const int64_t K = solver.K, padded = solver.padded;
  const Matrix<T> vectors = take_matrix<T>(arena, 5, K);
  fill_zero(vectors);
  T *g_bar = vectors.row(0), *moved = vectors.row(1), *v = vectors.row(2), *gram_w = vectors.row(3),
    *gram_v = vectors.row(4);
  const T* x = space.cross.row(t);
  T* x_bar = bar.cross.row(t);

  // d = along − w·x + w·g,  along = Q_tt − w·x,  r = x − g,  g = G w
  of.along += of.d;
  bar.inner.row(t)[t] += of.along;
  for (int64_t i = 0; i < padded; ++i) {
    g_bar[i] = of.d * made.w[i] - of.r[i];
    of.w[i] += of.d * (made.g[i] - x[i]) - of.along * x[i];
    x_bar[i] += of.r[i] - (of.d + of.along) * made.w[i];
  }
  multiply(space.gram, padded, g_bar, moved);
  add_scaled(padded, of.w, T(1), moved);
  add_symmetric_outer(bar.gram, T(1), g_bar, made.w);

  // c = a/s,  s = w·a + σ²,  a = U w
  const T s_bar = -dot(padded, of.c, made.c) / made.s;
  bar.noise[t] += s_bar;
  for (int64_t i = 0; i < padded; ++i) {
    of.a[i] += of.c[i] / made.s + s_bar * made.w[i];
    of.w[i] += s_bar * made.a[i];
  }
  multiply(space.cov, padded, of.a, moved);
  add_scaled(padded, of.w, T(1), moved);
  add_symmetric_outer(bar.cov, T(1), of.a, made.w);

  // (G + λI) w = x, or (G² + λI) w = G x, with the G and x that the attempt before left.
  solver.prepare(x, before, arena);
  __builtin_memcpy(v, of.w, static_cast<size_t>(padded) * sizeof(T));
  solver.solve(v);
  bar.ridge -= dot(padded, v, made.w);
  fill_zero(gram_bar);
  if (solver.args.squared_gram) {
    multiply(solver.gram, padded, v, gram_v);
    multiply(solver.gram, padded, made.w, gram_w);
    add_symmetric_outer(gram_bar, T(-1), v, gram_w);
    add_symmetric_outer(gram_bar, T(-1), gram_v, made.w);
    add_symmetric_outer(gram_bar, T(1), v, solver.target.data);
    __builtin_memcpy(solved_x_bar, gram_v, static_cast<size_t>(padded) * sizeof(T));
  } else {
    add_symmetric_outer(gram_bar, T(-1), v, made.w);
    __builtin_memcpy(solved_x_bar, v, static_cast<size_t>(padded) * sizeof(T));
  }
}

// Cotangents of an attempt's c, r and d from that of G + c rᵀ + r cᵀ + d c cᵀ.
template <class T>
void move_gram_backward(const Matrix<T>& gram_bar, const Attempt<T>& by, int64_t padded, AttemptCotangents<T>& of,
                        T* gram_c, T* gram_r) {
  combine<Into::kSet, 2>(gram_bar, gram_bar.rows, padded, {by.c, by.r}, {gram_c, gram_r});
  of.d += dot(padded, by.c, gram_c);
  for (int64_t i = 0; i < padded; ++i) {
    of.c[i] += 2 * gram_r[i] + 2 * by.d * gram_c[i];
    of.r[i] += 2 * gram_c[i];
  }
}

// Reverse of find_weights_afresh. `space` arrives as the search left it; each pattern is undone, and its attempts are
// made again from the state before it.
template <class T>
void find_weights_afresh_backward(const GramSpace<T>& space, const AfreshTape<T>& tape, const WritingArgs<T>& args,
                                  int64_t b, int64_t first, SearchCotangents<T>& bar, Arena& arena) {
  const AfreshSolver<T> solver(space, args, *args.ridge.at(b), arena);
  const int64_t K = solver.K, padded = solver.padded, attempts = args.num_opt_iters;
  const Matrix<T> gram_bar = take_matrix<T>(arena, K, K), vectors = take_matrix<T>(arena, 8, K);
  T *gram_c = vectors.row(4), *gram_r = vectors.row(5), *solved_x_bar = vectors.row(6), *cov_c = vectors.row(7);
  Attempt<T>* made = arena.take<Attempt<T>>(attempts);
  for (int64_t n = 0; n < attempts; ++n) made[n] = take_attempt<T>(K, arena);
  const Arena::Mark step_start = arena.mark();
  for (int64_t t = space.weights.rows - 1; t >= 0; --t) {
    if (!args.posterior.seen(b, first + t)) continue;
    solver.undo(tape.written(t, space.weights));
    const T noise = *args.posterior.noise_var.at(b, first + t);
    for (int64_t n = 0; n < attempts; ++n) {
      arena.release(step_start);
      solver.attempt(t, noise, n > 0 ? &made[n - 1] : nullptr, made[n], arena);
    }

    // Through what the last attempt wrote.
    const Attempt<T>& last = made[attempts - 1];
    fill_zero(vectors);
    AttemptCotangents<T> of{vectors.row(0), vectors.row(1), vectors.row(2), vectors.row(3)};
    __builtin_memcpy(of.w, bar.weights.row(t), static_cast<size_t>(K) * sizeof(T));
    move_gram_backward(bar.gram, last, padded, of, gram_c, gram_r);
    multiply(bar.cov, padded, last.c, cov_c);
    add_scaled(padded, of.a, T(-1), cov_c);
    add_scaled(padded, of.c, -last.s, cov_c);
    retreat_cross(space, bar, t, tape.along.row(t), last.w, last.c, of.w, of.c, padded);

    // Through the attempts.
    T* x_bar = bar.cross.row(t);
    for (int64_t n = attempts - 1; n >= 0; --n) {
      arena.release(step_start);
      attempt_backward(solver, t, made[n], n > 0 ? &made[n - 1] : nullptr, of, bar, gram_bar, solved_x_bar, arena);
      for (int64_t k = 0; k < K; ++k) add_scaled(padded, bar.gram.row(k), T(1), gram_bar.row(k));
      add_scaled(padded, x_bar, T(1), solved_x_bar);
      if (n == 0) break;
      const Attempt<T>& before = made[n - 1];
      fill_zero(vectors.rows_from(0, 4));
      of.d = 0;
      move_gram_backward(gram_bar, before, padded, of, gram_c, gram_r);
      of.along = dot(padded, before.c, solved_x_bar);
      add_scaled(padded, of.c, before.along, solved_x_bar);
    }
  }
}

// P̄ + P̄ᵀ from the cotangents of G, X and Q, the parts of P = Y Yᵀ with Y = [R; Z].
template <class T>
Matrix<T> take_doubled(const SearchCotangents<T>& bar, Arena& arena) {
  const int64_t K = bar.gram.rows, count = bar.cross.rows, both = K + count;
  const Matrix<T> doubled = take_matrix<T>(arena, both, both);
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < K; ++j) doubled.row(i)[j] = 2 * bar.gram.row(i)[j];
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t k = 0; k < K; ++k) doubled.row(K + t)[k] = doubled.row(k)[K + t] = bar.cross.row(t)[k];
    for (int64_t j = 0; j < t; ++j) doubled.row(K + t)[K + j] = doubled.row(K + j)[K + t] = bar.inner.row(t)[j];
    doubled.row(K + t)[K + t] = 2 * bar.inner.row(t)[t];
  }
  return doubled;
}

template <class T>
Matrix<T> take_zero(Arena& arena, int64_t rows, int64_t columns) {
  const Matrix<T> m = take_matrix<T>(arena, rows, columns);
  fill_zero(m);
  return m;
}

// Cotangents of a chunk as the search is undone, its patterns for rows.
template <class T>
struct RowCotangents {
  Matrix<T> weights, values;  // [t, K], [t, C]
  T* noise;                   // [t]
};

// Reverse of address_chunk: adds what the weights' cotangents say of the memory before the chunk and of its patterns.
template <class T>
void address_chunk_backward(const WritingArgs<T>& args, const State<T>& state, const Turned<T>& grad, int64_t b,
                            int64_t first, const RowCotangents<T>& bar, T& ridge_bar, Arena& arena) {
  const int64_t K = args.posterior.K, C = args.posterior.C, count = bar.weights.rows;
  const Matrix<T> stacked = take_matrix<T>(arena, K + count, C);
  const Memory<T> memory{stacked.rows_from(0, K), take_matrix<T>(arena, K, K)};
  load_mean(memory.mean, state);
  load_matrix(memory.cov, state.cov, 0);
  load_patterns(stacked.rows_from(K, count), args.posterior.values, args.posterior, b, first);
  const GramSpace<T> space =
      take_gram_space(memory, stacked, take_matrix<T>(arena, count, K), !factors_once(args), arena);
  SearchCotangents<T> search{.weights = bar.weights,
                             .gram = take_zero<T>(arena, K, K),
                             .cross = take_zero<T>(arena, count, K),
                             .inner = take_zero<T>(arena, count, count),
                             .cov = take_zero<T>(arena, K, K),
                             .noise = bar.noise};
  if (factors_once(args)) {
    Search<T> made = take_search(space, arena);
    find_weights(space, args, b, first, made, arena);
    find_weights_backward(space, made, args, b, first, search, arena);
  } else {
    AfreshTape<T> tape = take_afresh_tape<T>(K, count, arena);
    find_weights_afresh(space, args, b, first, arena, &tape);
    find_weights_afresh_backward(space, tape, args, b, first, search, arena);
  }
  // Ȳ = (P̄ + P̄ᵀ) Y
  const Matrix<T> doubled = take_doubled(search, arena);
  product<Into::kAdd>(grad.mean, K + count, transposed(stacked), doubled.block(0, K + count, 0, K));
  product<Into::kAdd>(bar.values, K + count, left(doubled.rows_from(K, count)), stacked);
  for (int64_t k = 0; k < K; ++k) add_scaled(round_up(K, kLanes<T>), grad.cov.row(k), T(1), search.cov.row(k));
  ridge_bar += search.ridge;
}

template <class T>
void write_backward(const WritingArgs<T>& args, const WritingGrads<T>& grads, int64_t begin, int64_t end) {
  const PosteriorArgs<T>& shared = args.posterior;
  const PosteriorGrads<T>& told = grads.posterior;
  for (int64_t b = begin; b < end; ++b) {
    Arena& arena = Arena::fresh();
    const Turned<T> grad = take_turned(shared, arena);
    load_cotangents(grad, told, b);
    T ridge_bar = 0;
    reverse_chunks(shared, kChunk, b, arena, [&](const State<T>& state, const Columns<T>& chunk, int64_t first) {
      const int64_t count = chunk.count();
      ChunkCotangents<T> columns = condition_backward(state, grad, chunk, shared, told, b, first, arena);
      const RowCotangents<T> bar{take_matrix<T>(arena, count, shared.K), take_transposed(columns.values, arena),
                                 columns.noise};
      load_or_zero(bar.weights, grads.weights.data ? grads.weights.from_row(first) : grads.weights, b);
      add_rows(bar.weights, take_transposed(columns.weights, arena));
      address_chunk_backward(args, state, grad, b, first, bar, ridge_bar, arena);
      store_matrix(told.to_values.from_row(first), b, bar.values);
      clear_masked(told.to_values, shared.C, shared, b, first, count);
      for (int64_t t = 0; t < count; ++t) *told.to_noise_var.at(b, first + t) = bar.noise[t];
    });
    store_cotangents(told, b, grad);
    *grads.to_ridge.at(b) = ridge_bar;
  }
}

}  // namespace fastkm::FASTKM_LEVEL
