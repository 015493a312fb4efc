// Backward of the write on a GPU: one block a memory, one launch.
#include "cuda/posterior/conditioning_backward.cuh"
#include "cuda/writing/search_afresh.cuh"

namespace fastkm {
namespace {

struct Reverse : Conditioned {
  float *x_bar, *v, *a_bar;  // rows [count, width] of the search: cotangent of x, A⁻¹ w̄, cotangent of a

  // Of the afresh search: every attempt at a pattern, the cotangents of the one in hand and of G, its matrix and U.
  Attempts attempts;
  float *made, *made_numbers;                                // [attempts, 5, width]; [attempts, 3]
  float *of_w, *of_a, *of_c, *of_r, *solved, *solved_x_bar;  // [width]
  float *left, *right;                                       // [width], products
  float *gram_bar, *solved_bar, *search_cov_bar;             // [width, width]
  float of_along, of_d;

  float inner_bar[kChunk][kChunk];
  float ridge_bar;
};

// Where the buffers of a block are; most used first.
__host__ __device__ void lay_out(Reverse& chunk, Space& space, const WritingArgs<float>& args) {
  set_sizes(chunk, args.posterior);
  const int64_t panel = kChunk * chunk.width, codes = kChunk * chunk.columns;
  const int64_t square = int64_t(chunk.width) * chunk.width;
  chunk.a = space.take(chunk.width), chunk.product = space.take(chunk.width);
  chunk.w = space.take(3 * panel), chunk.v = chunk.w + panel, chunk.x_bar = chunk.v + panel;
  chunk.c = space.take(panel), chunk.p = space.take(panel), chunk.q = space.take(panel);
  chunk.x = space.take(panel), chunk.w_bar = space.take(panel), chunk.a_bar = space.take(panel);
  chunk.inverse = space.take(square), chunk.cov = space.take(square);
  chunk.values_bar = space.take(3 * codes);
  chunk.delta = chunk.values_bar + codes, chunk.values = chunk.delta + codes;
  chunk.given = space.take(panel), chunk.gain = space.take(panel);
  chunk.cov_bar = space.take(square);
  if (factors_once(args)) return take_passes(chunk, space, args.posterior);
  take_attempts(chunk.attempts, space, args, chunk.width);
  chunk.made = space.take_global(args.num_opt_iters * 5 * chunk.width);
  chunk.made_numbers = space.take_global(args.num_opt_iters * 3);
  chunk.of_w = space.take(chunk.width), chunk.of_a = space.take(chunk.width), chunk.of_c = space.take(chunk.width);
  chunk.of_r = space.take(chunk.width), chunk.solved = space.take(chunk.width);
  chunk.solved_x_bar = space.take(chunk.width), chunk.left = space.take(chunk.width);
  chunk.right = space.take(chunk.width), chunk.system = space.take(square);
  chunk.gram_bar = space.take(square), chunk.solved_bar = space.take(square);
  chunk.search_cov_bar = space.take(square);
  take_passes(chunk, space, args.posterior);
}

// Reverse of the search. The cotangents of its A and U are sums of outer products too,
//   Ā = −½ Σ (v wᵀ + w vᵀ)      Ū = ½ Σ (ā wᵀ + w āᵀ),
// of the patterns after the one in hand.
__device__ void search_backward(Reverse& chunk) {
  const int K = chunk.K, width = chunk.width;
  const float ridge = chunk.ridge;
  float (&of)[6][2 * kChunk] = chunk.dot;
  for (int n = threadIdx.x; n < kChunk * kChunk; n += kThreads) chunk.inner_bar[n / kChunk][n % kChunk] = 0;
  fill_zero(chunk.x_bar, kChunk * width);
  fill_zero(chunk.v, kChunk * width);
  fill_zero(chunk.a_bar, kChunk * width);
  __syncthreads();
  for (int t = chunk.count - 1; t >= 0; --t) {
    if (!chunk.seen[t]) continue;
    const int after = t + 1, later = chunk.count - after;
    const float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t);
    multiply(chunk.row(chunk.v, after), width, later, width, w, of[0]);
    multiply(chunk.row(chunk.v, after), width, later, width, c, of[1]);
    multiply(chunk.row(chunk.a_bar, after), width, later, width, c, of[2]);
    multiply(chunk.row(chunk.w, t), width, later + 1, width, w, of[3]);
    multiply(chunk.row(chunk.w, after), width, later, width, c, of[4]);
    multiply(chunk.row(chunk.x_bar, after), width, later, width, c, of[5]);
    __syncthreads();

    // Through A' = A + λ (c wᵀ + w cᵀ) + d c cᵀ, U' = U − s c cᵀ, and x' = x + along c of the patterns after.
    const float s = chunk.s[t], d = chunk.d[t];
    float gram_cw = 0, gram_cc = 0, cov_cc = 0, along_c = 0;
    for (int j = 0; j < later; ++j) {
      gram_cw -= 0.5f * (of[1][j] * of[3][j + 1] + of[4][j] * of[0][j]);
      gram_cc -= of[1][j] * of[4][j];
      cov_cc += of[2][j] * of[4][j];
      along_c += chunk.along[t][after + j] * of[5][j];
    }
    const float s_bar = -(2 * ridge * gram_cw + 2 * d * gram_cc - s * cov_cc + along_c) / s;
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float gram_w = 0, gram_c = 0, cov_c = 0;
      for (int j = 0; j < later; ++j) {
        const int at = (after + j) * width + k;
        gram_w -= 0.5f * (chunk.v[at] * of[3][j + 1] + chunk.w[at] * of[0][j]);
        gram_c -= 0.5f * (chunk.v[at] * of[4][j] + chunk.w[at] * of[1][j]);
        cov_c += 0.5f * (chunk.a_bar[at] * of[4][j] + chunk.w[at] * of[2][j]);
      }
      float c_bar = 2 * ridge * gram_w + 2 * d * gram_c - s * cov_c;
      float w_bar =
          chunk.row(chunk.w_bar, t)[k] + 2 * ridge * gram_c - gram_cc * (chunk.row(chunk.x, t)[k] + 2 * ridge * w[k]);
      chunk.row(chunk.x_bar, t)[k] -= gram_cc * w[k];
      for (int j = 0; j < later; ++j) {
        const int at = (after + j) * width + k;
        const float along = chunk.along[t][after + j], x = chunk.x[at] - along * c[k];
        chunk.x[at] = x;
        c_bar += along * chunk.x_bar[at];
        w_bar -= of[5][j] * x;
        chunk.x_bar[at] -= of[5][j] * w[k];
      }

      // Through c = a/s and s = w·a + σ².
      chunk.row(chunk.a_bar, t)[k] = c_bar / s - cov_c + s_bar * w[k];
      chunk.row(chunk.w_bar, t)[k] = w_bar + s_bar * s * c[k];
    }
    if (threadIdx.x < later) chunk.inner_bar[after + threadIdx.x][t] = of[5][threadIdx.x];
    if (threadIdx.x == 0) {
      chunk.inner_bar[t][t] = gram_cc;
      chunk.noise_bar[t] += s_bar;
      chunk.ridge_bar += 2 * gram_cw - gram_cc * of[3][0];
    }
    __syncthreads();

    // Through a = U w.
    const float* const a_bar = chunk.row(chunk.a_bar, t);
    multiply(chunk.cov, width, K, width, a_bar, chunk.product);
    multiply(chunk.c, width, t, width, a_bar, of[0]);
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float sum = chunk.product[k];
      for (int j = 0; j < t; ++j) sum -= chunk.c[j * width + k] * (chunk.s[j] * of[0][j]);
      chunk.row(chunk.w_bar, t)[k] += sum;
    }
    __syncthreads();

    // Through w = A⁻¹ x.
    const float* const w_bar = chunk.row(chunk.w_bar, t);
    multiply(chunk.inverse, width, K, width, w_bar, chunk.product);
    multiply(chunk.p, width, t, width, w_bar, of[0]);
    multiply(chunk.q, width, t, width, w_bar, of[1]);
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      const float v = chunk.product[k] - inverse_terms(chunk, t, k, of[0], of[1]);
      chunk.row(chunk.v, t)[k] = v;
      chunk.row(chunk.x_bar, t)[k] += v;
    }
    __syncthreads();
  }
  for (int t = 0; t < chunk.count; ++t)
    multiply(chunk.row(chunk.v, t), width, 1, width, chunk.row(chunk.w, t), chunk.dot[0] + t);
  __syncthreads();
  if (threadIdx.x == 0)
    for (int t = 0; t < chunk.count; ++t) chunk.ridge_bar -= chunk.dot[0][t];
  __syncthreads();
}

// What an attempt leaves in row t, and back.
__device__ void save_attempt(Reverse& chunk, int t, int64_t n) {
  float* const made = chunk.made + n * 5 * chunk.width;
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) {
    made[k] = chunk.row(chunk.w, t)[k], made[chunk.width + k] = chunk.row(chunk.c, t)[k];
    made[2 * chunk.width + k] = chunk.row(chunk.q, t)[k];
    made[3 * chunk.width + k] = chunk.a[k], made[4 * chunk.width + k] = chunk.attempts.g[k];
  }
  if (threadIdx.x == 0) {
    float* const numbers = chunk.made_numbers + n * 3;
    numbers[0] = chunk.s[t], numbers[1] = chunk.d[t], numbers[2] = chunk.attempts.along;
  }
  __syncthreads();
}

__device__ void restore_attempt(Reverse& chunk, int t, int64_t n) {
  const float *made = chunk.made + n * 5 * chunk.width, *numbers = chunk.made_numbers + n * 3;
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) {
    chunk.row(chunk.w, t)[k] = made[k], chunk.row(chunk.c, t)[k] = made[chunk.width + k];
    chunk.row(chunk.q, t)[k] = made[2 * chunk.width + k];
    chunk.a[k] = made[3 * chunk.width + k], chunk.attempts.g[k] = made[4 * chunk.width + k];
  }
  if (threadIdx.x == 0) chunk.s[t] = numbers[0], chunk.d[t] = numbers[1], chunk.attempts.along = numbers[2];
  __syncthreads();
}

// Cotangents of c, r and d of row t from that of G + c rᵀ + r cᵀ + d c cᵀ, added; those of w and a are cleared.
__device__ void move_gram_backward(Reverse& chunk, const float* bar, int t) {
  const int K = chunk.K, width = chunk.width;
  const float *c = chunk.row(chunk.c, t), *r = chunk.row(chunk.q, t);
  multiply(bar, width, K, width, c, chunk.left);
  multiply(bar, width, K, width, r, chunk.right);
  __syncthreads();
  multiply(chunk.left, width, 1, width, c, chunk.dot[0]);
  for (int k = threadIdx.x; k < K; k += kThreads) {
    chunk.of_w[k] = chunk.of_a[k] = 0;
    chunk.of_c[k] = 2 * chunk.right[k] + 2 * chunk.d[t] * chunk.left[k];
    chunk.of_r[k] = 2 * chunk.left[k];
  }
  __syncthreads();
  if (threadIdx.x == 0) chunk.of_d = chunk.dot[0][0], chunk.of_along = 0;
  __syncthreads();
}

// Reverse of attempt n, which stands in row t with its a and g: takes the cotangents of its w, a, c, r, along and d,
// adds those of G, U, x, Q and λ, and leaves those of the matrix and vector it solved with in `solved_bar` and
// `solved_x_bar`.
__device__ void attempt_backward(Reverse& chunk, int t, int64_t n) {
  const int K = chunk.K, width = chunk.width;
  const float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t), *x = chunk.row(chunk.x, t);
  Attempts& attempts = chunk.attempts;
  float (&of)[6][2 * kChunk] = chunk.dot;

  // d = along − w·x + w·g,  along = Q_tt − w·x,  r = x − g,  g = G w
  multiply(chunk.of_c, width, 1, width, c, of[2]);
  __syncthreads();
  const float d_bar = chunk.of_d, along_bar = chunk.of_along + d_bar, s = chunk.s[t], s_bar = -of[2][0] / s;
  for (int k = threadIdx.x; k < K; k += kThreads) {
    chunk.left[k] = d_bar * w[k] - chunk.of_r[k];
    chunk.of_w[k] += d_bar * (attempts.g[k] - x[k]) - along_bar * x[k] + s_bar * chunk.a[k];
    chunk.row(chunk.x_bar, t)[k] += chunk.of_r[k] - (d_bar + along_bar) * w[k];

    // c = a/s,  s = w·a + σ²
    chunk.of_a[k] += chunk.of_c[k] / s + s_bar * w[k];
  }
  if (threadIdx.x == 0) {
    chunk.inner_bar[t][t] += along_bar;
    chunk.noise_bar[t] += s_bar;
  }
  __syncthreads();
  multiply_gram(chunk, t, chunk.left, chunk.right);
  for (int k = threadIdx.x; k < K; k += kThreads) chunk.of_w[k] += chunk.right[k];
  add_symmetric(chunk.gram_bar, K, width, 1, chunk.left, w);

  // a = U w
  add_symmetric(chunk.search_cov_bar, K, width, 1, chunk.of_a, w);
  __syncthreads();
  multiply_cov(chunk, t, chunk.of_a, chunk.right);
  for (int k = threadIdx.x; k < K; k += kThreads) chunk.of_w[k] += chunk.right[k];
  __syncthreads();

  // (G + λI) w = x, or (G² + λI) w = G x, with the G and x that the attempt before left.
  if (n > 0) restore_attempt(chunk, t, n - 1);
  const float* const solution = chunk.made + n * 5 * width;
  prepare(chunk, attempts, t, n);
  solve(chunk, attempts, chunk.of_w, chunk.solved);
  multiply(chunk.solved, width, 1, width, solution, of[2]);
  fill_zero(chunk.solved_bar, int64_t(width) * width);
  if (attempts.squared) {
    multiply(attempts.current, width, K, width, chunk.solved, chunk.solved_x_bar);
    multiply(attempts.current, width, K, width, solution, chunk.right);
    __syncthreads();
    add_symmetric(chunk.solved_bar, K, width, -1, chunk.solved, chunk.right);
    add_symmetric(chunk.solved_bar, K, width, -1, chunk.solved_x_bar, solution);
    add_symmetric(chunk.solved_bar, K, width, 1, chunk.solved, attempts.x);
  } else {
    for (int k = threadIdx.x; k < K; k += kThreads) chunk.solved_x_bar[k] = chunk.solved[k];
    __syncthreads();
    add_symmetric(chunk.solved_bar, K, width, -1, chunk.solved, solution);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < int64_t(width) * width; i += kThreads) chunk.gram_bar[i] += chunk.solved_bar[i];
  for (int k = threadIdx.x; k < K; k += kThreads) chunk.row(chunk.x_bar, t)[k] += chunk.solved_x_bar[k];
  if (threadIdx.x == 0) chunk.ridge_bar -= of[2][0];
  __syncthreads();
}

// Reverse of search_afresh: the attempts at each pattern are made again from the state before it.
__device__ void search_afresh_backward(Reverse& chunk) {
  const int K = chunk.K, width = chunk.width;
  const int64_t count = chunk.attempts.count;
  for (int n = threadIdx.x; n < kChunk * kChunk; n += kThreads) chunk.inner_bar[n / kChunk][n % kChunk] = 0;
  fill_zero(chunk.x_bar, kChunk * width);
  fill_zero(chunk.gram_bar, int64_t(width) * width);
  fill_zero(chunk.search_cov_bar, int64_t(width) * width);
  __syncthreads();
  for (int t = chunk.count - 1; t >= 0; --t) {
    if (!chunk.seen[t]) continue;
    const float *c = chunk.row(chunk.c, t), *w = chunk.row(chunk.w, t);
    const int after = t + 1, later = chunk.count - after;
    for (int k = threadIdx.x; k < K; k += kThreads)
      for (int j = after; j < chunk.count; ++j) chunk.row(chunk.x, j)[k] -= chunk.along[t][j] * c[k];
    __syncthreads();
    for (int64_t n = 0; n < count; ++n) {
      attempt(chunk, chunk.attempts, t, n);
      save_attempt(chunk, t, n);
    }

    // Through what the last attempt wrote.
    move_gram_backward(chunk, chunk.gram_bar, t);
    multiply(chunk.search_cov_bar, width, K, width, c, chunk.left);
    multiply(chunk.row(chunk.x_bar, after), width, later, width, c, chunk.dot[3]);
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float of_w = chunk.row(chunk.w_bar, t)[k], of_c = chunk.of_c[k] - chunk.s[t] * chunk.left[k];
      for (int j = 0; j < later; ++j) {
        float& x_bar = chunk.row(chunk.x_bar, after + j)[k];
        of_c += chunk.along[t][after + j] * x_bar;
        of_w -= chunk.dot[3][j] * chunk.row(chunk.x, after + j)[k];
        x_bar -= chunk.dot[3][j] * w[k];
      }
      chunk.of_w[k] = of_w, chunk.of_c[k] = of_c, chunk.of_a[k] = -chunk.left[k];
    }
    if (threadIdx.x < later) chunk.inner_bar[after + threadIdx.x][t] = chunk.dot[3][threadIdx.x];
    __syncthreads();

    // Through the attempts; each finds the one before it in row t.
    for (int64_t n = count - 1; n >= 0; --n) {
      attempt_backward(chunk, t, n);
      if (n == 0) break;
      move_gram_backward(chunk, chunk.solved_bar, t);
      multiply(chunk.solved_x_bar, width, 1, width, c, chunk.dot[3]);
      __syncthreads();
      if (threadIdx.x == 0) chunk.of_along = chunk.dot[3][0];
      for (int k = threadIdx.x; k < K; k += kThreads) chunk.of_c[k] += chunk.attempts.along * chunk.solved_x_bar[k];
      __syncthreads();
    }
    restore_attempt(chunk, t, count - 1);
  }
}

// Down to the codes: what conditioning and the search say of R and Z.
//   Z̄ += X̄ R + (Q̄ + Q̄ᵀ) Z      R̄ = R̄' − Wᵀ Z̄ + 2 Ḡ R + X̄ᵀ Z, with the Z̄ of conditioning,
// where 2 Ḡ R = −Wᵀ (V R) − Vᵀ (W R) unless the search factored afresh.
template <bool kAfresh>
__device__ void codes_backward(Reverse& chunk, const Batch<float>& to_values, int64_t b, int64_t first) {
  const int K = chunk.K, C = chunk.C, width = chunk.width, columns = chunk.columns, count = chunk.count;

  // W R = Z − L E, in the place of E.
  for (int k = threadIdx.x; k < C; k += kThreads)
    for (int t = count - 1; t >= 0; --t) {
      float sum = chunk.values[t * columns + k];
      for (int j = 0; j <= t; ++j) sum -= chunk.root_at(t, j) * chunk.delta[j * columns + k];
      chunk.delta[t * columns + k] = sum;
    }
  const Side mean{chunk.state, 1, columns};  // columns of R
  product<kEither, 16, 128>(
      count, C, K, Side{chunk.x_bar, width, 1}, mean, chunk, false, [&](int i, int j, const auto& sums) {
        constexpr int kEach = sizeof(sums) / sizeof(sums[0]);
#pragma unroll
        for (int n = 0; n < kEach; ++n) {
          const int k = j + n;
          if (k >= C) continue;
          float sum = sums[n] + chunk.values_bar[i * columns + k];
          for (int t = 0; t < count; ++t)
            sum += (chunk.inner_bar[i][t] + chunk.inner_bar[t][i]) * chunk.values[t * columns + k];
          *element(to_values, b, first + i, k) = chunk.seen[i] ? sum : 0;
        }
      });
  if constexpr (kAfresh)
    product<kEither, 64, 64>(K, C, K, Side{chunk.gram_bar, width, 1}, mean, chunk, false,
                             [&](int i, int j, const auto& sums) {
                               float* const at = mean_bar_at(chunk, i, j);
                               put_sum(at, at, 1, 2, sums, C - j);
                             });
  else
    product<kEither, 16, 128>(count, C, K, Side{chunk.v, width, 1}, mean, chunk, false,
                              [&](int i, int j, const auto& sums) {
                                float* const at = chunk.values_bar + i * columns + j;
                                put_sum(at, at, 1, 1, sums, C - j);
                              });

  // Wᵀ Z̄ + Vᵀ (W R) − X̄ᵀ Z in one product: the panels lie one behind the other, whole chunks of them.
  const int hidden = kChunk - count;
  fill_zero(chunk.row(chunk.w, count), int64_t(hidden) * width);
  fill_zero(chunk.values_bar + count * columns, int64_t(hidden) * columns);
  fill_zero(chunk.delta + count * columns, int64_t(hidden) * columns);
  for (int n = threadIdx.x; n < kChunk * width; n += kThreads) chunk.x_bar[n] = -chunk.x_bar[n];
  __syncthreads();
  product<kEither, 64, 64>(K, C, 3 * kChunk, Side{chunk.w, 1, width}, Side{chunk.values_bar, 1, columns}, chunk, false,
                           [&](int i, int j, const auto& sums) {
                             float* const at = mean_bar_at(chunk, i, j);
                             put_sum(at, at, 1, -1, sums, C - j);
                           });
  if constexpr (kAfresh)
    for (int64_t n = threadIdx.x; n < int64_t(width) * width; n += kThreads)
      chunk.cov_bar[n] += chunk.search_cov_bar[n];
  else
    for (int n = threadIdx.x; n < count * width; n += kThreads) chunk.given[n] += chunk.a_bar[n];
  __syncthreads();
  add_to_cov_bar(chunk);
}

// Bytes a memory: inputs and cotangents are read once, Z and the weights once more for the way back, and cotangents are
// written once, 1.2 times the least, while R and its cotangent fit on chip, at K = 32 and C = 100. Where the cotangent
// does not, it is read three times a chunk and written once, 3.6 times the least at C = 200 and K = 64 or 128, beside
// what the working copy of R takes of the workspace.
template <bool kAfresh>
__global__ void __launch_bounds__(kThreads, 1)
    write_backward_kernel(FASTKM_IN_PLACE WritingArgs<float> args, FASTKM_IN_PLACE WritingGrads<float> grads, int64_t B,
                          FASTKM_IN_PLACE Workspace workspace) {
  const PosteriorArgs<float>& shared = args.posterior;
  const PosteriorGrads<float>& told = grads.posterior;
  Reverse& chunk = *reinterpret_cast<Reverse*>(dynamic_shared());
  if (threadIdx.x == 0) {
    Space space = space_of_block<Reverse>(workspace);
    lay_out(chunk, space, args);
    chunk.precision = shared.precision;
  }
  clear_space<Reverse>(workspace);
  const int K = chunk.K, width = chunk.width;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    if (threadIdx.x == 0) {
      chunk.ridge = *element(args.ridge, b);
      chunk.ridge_bar = 0;
    }
    load_memory(chunk, shared, told, b);
    condition_all(chunk, shared, b);

    const int64_t chunks = (shared.T_ + kChunk - 1) / kChunk;
    for (int64_t first = (chunks - 1) * kChunk; first >= 0; first -= kChunk) {
      restore_chunk(chunk, shared, b, first);

      // The steps of the search again, and back through them.
      if constexpr (kAfresh) {
        take_inner_products<true>(chunk, chunk.system, 0);
        search_afresh(chunk, chunk.attempts);
      } else {
        take_inner_products<true>(chunk, chunk.inverse, chunk.ridge);
        if (!invert(chunk.inverse, K, width, chunk.p, chunk)) hide_patterns(chunk);
        search<kReplay>(chunk);
      }
      condition_backward(chunk, told, grads.weights, b, first);
      if constexpr (kAfresh)
        search_afresh_backward(chunk);
      else
        search_backward(chunk);
      codes_backward<kAfresh>(chunk, told.to_values, b, first);
      if (threadIdx.x < chunk.count) *element(told.to_noise_var, b, first + threadIdx.x) = chunk.noise_bar[threadIdx.x];
      __syncthreads();
    }
    store_mean_bar(chunk, told, b);
    store_cov_bar(chunk, told, b);
    if (threadIdx.x == 0) *element(grads.to_ridge, b) = chunk.ridge_bar;
    __syncthreads();
  }
}

template <bool kAfresh>
const char* start(const WritingArgs<float>& args, const WritingGrads<float>& grads, int64_t B, cuda::Context& context) {
  const Device device = current_device();
  Workspace workspace = measure<Reverse>(device, [&](Reverse& head, Space& space) { lay_out(head, space, args); });
  const int64_t blocks = min(B, resident_blocks(device, write_backward_kernel<kAfresh>, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(write_backward_kernel<kAfresh>, blocks, kThreads, workspace.shared_bytes(), context.stream, args, grads,
                B, workspace);
}

}  // namespace

const char* cuda::write_backward(const WritingArgs<float>& args, const WritingGrads<float>& grads, int64_t B,
                                 Context& context) {
  if (B == 0) return nullptr;
  return factors_once(args) ? start<false>(args, grads, B, context) : start<true>(args, grads, B, context);
}

}  // namespace fastkm
