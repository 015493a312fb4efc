// What the write and its backward share on a GPU: one block computes one memory, 16 patterns at a time.
//
// The search for the weights needs H = (R Rᵀ + λI)⁻¹, A = R Rᵀ + λI and U as they were before the chunk, and nothing of
// size K × K changes while it runs: with w, c, p = H c and q = H w of each pattern written so far, what later patterns
// see is a matrix before the chunk plus a few outer products,
//   A_t = A + Σ d c cᵀ + λ (c wᵀ + w cᵀ)      H_t = H − Σ [p q] N [p q]ᵀ      U_t = U − Σ s c cᵀ.
// So a step reads each matrix once and writes none; undoing a step, as the backward does, is to leave its terms out.
#pragma once

#include "cuda/linalg/dense.cuh"

namespace fastkm {
namespace {

constexpr int kChunk = 16;  // as on the CPU: small chunks round less
static_assert(kChunk == kRoot, "a chunk is one diagonal block");

// A chunk of a memory, at the start of shared memory: registers are for sums. Rows of panels are patterns, `width`
// long, zero in the padding and where a pattern is masked; index t is a pattern, j one written before it.
struct Chunk : Block {
  int K, width, C, columns, count;  // width, columns: K and C in whole vectors
  float ridge;
  Side mean;                      // R before the chunk
  float *cov, *inverse, *system;  // U, H, A before the chunk [width, width]
  float *w, *c, *p, *q;           // of each pattern, once it was written
  float *x, *y;                   // R_t z and H_t R_t z of each pattern to come; x stays as its own step left it
  float *a, *v, *product;         // [width], of the step in hand
  float* values;                  // Z [count, columns]

  float noise[kChunk], s[kChunk], d[kChunk];
  float step[kChunk][kChunk];                         // c_j · w_t
  float along[kChunk][kChunk];                        // δ_t · z_later
  float inner[kChunk][kChunk];                        // Q = Z Zᵀ
  float of_cc[kChunk], of_cw[kChunk], of_ww[kChunk];  // N of each pattern
  float dot[6][2 * kChunk];                           // products waiting to be used
  int seen[kChunk];

  __device__ float* row(float* panel, int t) const { return panel + t * width; }
};

// ---- vectors -------------------------------------------------------------------------------------------------------

__device__ inline float dot4(float4 x, float4 y) { return x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w; }

// y = M x for the rows of M; both are padded with zeros to `width`, a multiple of four. A few lanes share a row, and
// four rows are summed at once: each exchange halves the sums a lane still holds.
__device__ FASTKM_OUT_OF_LINE inline void multiply(const float* m, int64_t ld, int rows, int width, const float* x,
                                                   float* y) {
  int lanes = 4;
  while (lanes < 32 && 4 * lanes < width) lanes *= 2;
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = kThreads / lanes;
  for (int first = 0; first < rows; first += 4 * groups) {
    float sum[4] = {};
    for (int k = 4 * lane; k < width; k += 4 * lanes) {
      const float4 right = *reinterpret_cast<const float4*>(x + k);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int i = first + group + n * groups;
        if (i < rows) sum[n] += dot4(*reinterpret_cast<const float4*>(m + i * ld + k), right);
      }
    }
    const bool upper = lane & (lanes / 2), upper_half = lane & (lanes / 4);
    const float from_pair[2] = {upper ? sum[0] : sum[2], upper ? sum[1] : sum[3]};
    float pair[2] = {upper ? sum[2] : sum[0], upper ? sum[3] : sum[1]};
    for (int n = 0; n < 2; ++n) pair[n] += __shfl_xor_sync(~0u, from_pair[n], lanes / 2);
    float one = upper_half ? pair[1] : pair[0];
    one += __shfl_xor_sync(~0u, upper_half ? pair[0] : pair[1], lanes / 4);
    for (int offset = lanes / 8; offset > 0; offset /= 2) one += __shfl_xor_sync(~0u, one, offset);
    const int i = first + group + (2 * upper + upper_half) * groups;
    if (lane % (lanes / 4) == 0 && i < rows) y[i] = one;
  }
}

// Zero what no row or column of a padded square matrix holds.
__device__ inline void clear_padding(float* m, int size, int width) {
  const int extra = width - size;
  for (int n = threadIdx.x; n < extra * width; n += kThreads)
    m[int64_t(n / extra) * width + size + n % extra] = m[(int64_t(size) + n % extra) * width + n / extra] = 0;
}

// ---- the inverse ---------------------------------------------------------------------------------------------------

// A ← A⁻¹ in place, A symmetric positive definite [size, size], rows `width` apart, padded with zeros to width × width.
// Sixteen rows at a time are swept: with N = L⁻¹ A₁₂ the rest loses Nᵀ N, A₁₂ becomes L⁻ᵀ N, and the block −A₁₁⁻¹;
// after every row was swept −A⁻¹ is left. Returns whether every pivot was positive, and leaves it in the status.
__device__ inline bool invert(float* a, int size, int width, float* panel, Chunk& chunk) {
  if (threadIdx.x == 0) chunk.positive = true;
  __syncthreads();
  for (int first = 0; first < size; first += kChunk) {
    const int count = min(kChunk, size - first);
    if (threadIdx.x < 32) factor_root(a + int64_t(first) * width + first, width, count, chunk);
    __syncthreads();
    const float (&root)[kChunk][kChunk + 1] = chunk.root;
    for (int k = threadIdx.x; k < width; k += kThreads) {
      const bool swept = k >= first && k < first + count;
      float column[kChunk], solved[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        column[i] = swept ? root[i][k - first] : i < count && k < size ? a[int64_t(first + i) * width + k] : 0;
#pragma unroll
      for (int i = kChunk - 1; i >= 0 && !swept; --i) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j <= i; ++j) sum += root[i][j] * column[j];
        column[i] = sum;
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        float sum = 0;
#pragma unroll
        for (int j = i; j < kChunk; ++j) sum += root[j][i] * column[j];
        solved[i] = swept ? -sum : sum;
        panel[i * width + k] = swept ? 0 : column[i];
      }
      float* down = a + int64_t(first) * width + k;
      float* const across = a + int64_t(k) * width + first;
#pragma unroll
      for (int i = 0; i < kChunk; ++i, down += width) {
        if (i >= count || k >= size) continue;
        *down = solved[i];
        if (!swept) across[i] = solved[i];
      }
    }
    __syncthreads();
    add_outer(a, width, -1, kChunk, panel, panel);
    __syncthreads();
  }
  for (int64_t i = threadIdx.x; i < int64_t(size) * width; i += kThreads) a[i] = -a[i];
  if (threadIdx.x == 0 && !chunk.positive && chunk.status == kGood) chunk.status = kNotPositiveDefinite;
  __syncthreads();
  return chunk.positive;
}

// ---- the search ----------------------------------------------------------------------------------------------------

// What the search is asked for.
enum Search {
  kFind,      // the weights
  kReplay,    // the same steps again with weights that are known
  kCondition  // only what conditioning on known weights needs: c, s and step
};

// Σ_j of what the patterns before t change in a product with H, at row k; dots hold p_j · y and q_j · y.
__device__ inline float inverse_terms(const Chunk& chunk, int t, int k, const float* of_p, const float* of_q) {
  float sum = 0;
  for (int j = 0; j < t; ++j) {
    const float on_p = chunk.of_cc[j] * of_p[j] + chunk.of_cw[j] * of_q[j];
    const float on_q = chunk.of_cw[j] * of_p[j] + chunk.of_ww[j] * of_q[j];
    sum += chunk.p[j * chunk.width + k] * on_p + chunk.q[j * chunk.width + k] * on_q;
  }
  return sum;
}

// One step of refinement of w = y against A_t w = x: row t of w.
__device__ inline void refine(Chunk& chunk, int t) {
  const int width = chunk.width;
  const float *x = chunk.row(chunk.x, t), *y = chunk.row(chunk.y, t);
  float (&of)[6][2 * kChunk] = chunk.dot;
  multiply(chunk.system, width, chunk.K, width, y, chunk.product);
  multiply(chunk.c, width, t, width, y, of[0]);
  multiply(chunk.w, width, t, width, y, of[1]);
  __syncthreads();
  for (int k = threadIdx.x; k < chunk.K; k += kThreads) {
    float sum = chunk.product[k];
    for (int j = 0; j < t; ++j) {
      sum += chunk.c[j * width + k] * (chunk.d[j] * of[0][j] + chunk.ridge * of[1][j]);
      sum += chunk.w[j * width + k] * (chunk.ridge * of[0][j]);
    }
    chunk.v[k] = x[k] - sum;
  }
  __syncthreads();
  multiply(chunk.inverse, width, chunk.K, width, chunk.v, chunk.product);
  multiply(chunk.p, width, t, width, chunk.v, of[0]);
  multiply(chunk.q, width, t, width, chunk.v, of[1]);
  __syncthreads();
  for (int k = threadIdx.x; k < chunk.K; k += kThreads)
    chunk.row(chunk.w, t)[k] = y[k] + chunk.product[k] - inverse_terms(chunk, t, k, of[0], of[1]);
  __syncthreads();
}

// A hidden pattern is one that changes nothing.
template <bool kAll>
__device__ void leave_out(Chunk& chunk, int t) {
  for (int k = threadIdx.x; k < chunk.width; k += kThreads) {
    chunk.row(chunk.w, t)[k] = chunk.row(chunk.c, t)[k] = 0;
    if (kAll) chunk.row(chunk.p, t)[k] = chunk.row(chunk.q, t)[k] = 0;
  }
  if (threadIdx.x < kChunk) chunk.step[t][threadIdx.x] = chunk.along[t][threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    chunk.s[t] = chunk.noise[t];
    chunk.d[t] = chunk.of_cc[t] = chunk.of_cw[t] = chunk.of_ww[t] = 0;
  }
  __syncthreads();
}

// s = w · U_t w + σ² from its first term. Below σ² by more than rounding explains, U is not positive definite.
__device__ inline float pivot(Chunk& chunk, int t, float explained) {
  if (threadIdx.x == 0) {
    float prior = chunk.noise[t] + fabsf(explained);
    for (int j = 0; j < t; ++j) prior += chunk.s[j] * chunk.step[t][j] * chunk.step[t][j];
    const float slack = 4 * static_cast<float>(chunk.K + chunk.count) * kEpsilon * prior;
    if (!(explained >= -slack) && chunk.status == kGood) chunk.status = kNotPositiveDefinite;
  }
  return chunk.noise[t] + (explained > 0 ? explained : 0);
}

// Steps through the patterns of a chunk.
template <Search kSearch>
__device__ void search(Chunk& chunk) {
  const int width = chunk.width, K = chunk.K;
  float (&of)[6][2 * kChunk] = chunk.dot;
  for (int t = 0; t < chunk.count; ++t) {
    float *w = chunk.row(chunk.w, t), *c = chunk.row(chunk.c, t), *x = chunk.row(chunk.x, t);
    if (!chunk.seen[t]) {
      leave_out<kSearch != kCondition>(chunk, t);
      continue;
    }
    if (kSearch == kFind) refine(chunk, t);

    // a = U_t w, and q = H_t w.
    multiply(chunk.cov, width, K, width, w, chunk.a);
    multiply(chunk.c, width, t, width, w, chunk.step[t]);
    if (kSearch != kCondition) {
      multiply(chunk.inverse, width, K, width, w, chunk.product);
      multiply(chunk.p, width, t, width, w, of[0]);
      multiply(chunk.q, width, t, width, w, of[1]);
      multiply(x, width, chunk.count - t, width, w, of[2]);
      multiply(w, width, 1, width, w, of[3]);
    }
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float sum = chunk.a[k];
      for (int j = 0; j < t; ++j) sum -= chunk.c[j * width + k] * (chunk.s[j] * chunk.step[t][j]);
      chunk.a[k] = sum;
      if (kSearch != kCondition) chunk.row(chunk.q, t)[k] = chunk.product[k] - inverse_terms(chunk, t, k, of[0], of[1]);
    }
    __syncthreads();

    // s = w · a + σ², c = a / s, and p = H_t c.
    multiply(w, width, 1, width, chunk.a, of[4]);
    if (kSearch != kCondition) {
      multiply(chunk.inverse, width, K, width, chunk.a, chunk.product);
      multiply(chunk.p, width, t, width, chunk.a, of[0]);
      multiply(chunk.q, width, t + 1, width, chunk.a, of[1]);
      multiply(w, width, 1, width, chunk.row(chunk.q, t), of[5]);
    }
    __syncthreads();
    const float s = pivot(chunk, t, of[4][0]);
    for (int k = threadIdx.x; k < K; k += kThreads) {
      c[k] = chunk.a[k] / s;
      if (kSearch != kCondition)
        chunk.row(chunk.p, t)[k] = (chunk.product[k] - inverse_terms(chunk, t, k, of[0], of[1])) / s;
    }
    if (threadIdx.x == 0) chunk.s[t] = s;
    const float qc = of[1][t] / s, qw = of[5][0];
    if (kSearch == kCondition) {
      __syncthreads();
      continue;
    }
    __syncthreads();

    // Woodbury: N = ([[d, λ], [λ, 0]]⁻¹ + [c w]ᵀ H [c w])⁻¹, and what the patterns to come see of the step.
    const int later = chunk.count - t - 1;
    const float ridge = chunk.ridge, d = chunk.inner[t][t] - of[2][0] - ridge * of[3][0];
    multiply(chunk.p + t * width, width, 1, width, c, of[0]);
    multiply(x + width, width, later, width, chunk.row(chunk.p, t), of[0] + 1);
    multiply(x + width, width, later, width, chunk.row(chunk.q, t), of[1] + 1);
    __syncthreads();
    const float cc = of[0][0], cw = qc + 1 / ridge, ww = qw - d / (ridge * ridge);
    const float determinant = cc * ww - cw * cw;
    const float of_cc = ww / determinant, of_cw = -cw / determinant, of_ww = cc / determinant;
    if (threadIdx.x == 0) {
      chunk.d[t] = d;
      chunk.of_cc[t] = of_cc, chunk.of_cw[t] = of_cw, chunk.of_ww[t] = of_ww;
    }
    if (threadIdx.x < kChunk) {
      const int l = threadIdx.x - t;
      chunk.along[t][threadIdx.x] = l > 0 && l <= later ? chunk.inner[threadIdx.x][t] - of[2][l] : 0;
    }
    const float *p = chunk.row(chunk.p, t), *q = chunk.row(chunk.q, t);
    for (int k = threadIdx.x; k < K; k += kThreads)
      for (int l = 1; l <= later; ++l) {
        const float along = chunk.inner[t + l][t] - of[2][l];
        x[l * width + k] += along * c[k];
        if (kSearch != kFind) continue;
        const float px = of[0][l] + along * cc, qx = of[1][l] + along * qc;
        chunk.row(chunk.y, t + l)[k] +=
            along * p[k] - p[k] * (of_cc * px + of_cw * qx) - q[k] * (of_cw * px + of_ww * qx);
      }
    __syncthreads();
  }
}

// ---- around the search ---------------------------------------------------------------------------------------------

// The inner products a search starts from: A = R Rᵀ + λI, X = Z Rᵀ, Q = Z Zᵀ, with λ as given. They are what is solved,
// so they are always float32. One pass over R saves bytes and costs registers.
template <bool kOnePass>
__device__ void take_inner_products(Chunk& chunk, float* gram, float ridge) {
  const Side mean = chunk.mean;
  const Side values{chunk.values, chunk.columns, 1};
  const int K = chunk.K, width = chunk.width;
  clear_padding(gram, K, width);
  const auto store_gram = [&](int i, int j, const auto& sums) {
    int n = 0;
    for (float sum : sums) {
      const int column = j + n++;
      if (column > i) continue;
      gram[int64_t(i) * width + column] = sum + (i == column ? ridge : 0);
      gram[int64_t(column) * width + i] = sum + (i == column ? ridge : 0);
    }
  };
  const auto store_x = [&](int i, int j, const auto& sums) { put(chunk.row(chunk.x, i) + j, sums, K - j); };
  if (kOnePass && K <= kOnePassRows) {
    products_in_one_pass<true>(K, chunk.C, mean, chunk.count, values, chunk, store_gram, store_x);
  } else {
    product<kExact, 64, 64>(K, K, chunk.C, mean, mean, chunk, true, store_gram);
    product<kExact, 16, 128>(chunk.count, K, chunk.C, values, mean, chunk, false, store_x);
  }
  product<kExact, 16, 128>(chunk.count, chunk.count, chunk.C, values, values, chunk, false,
                           [&](int i, int j, const auto& sums) { put(chunk.inner[i] + j, sums, chunk.count - j); });
}

__host__ __device__ inline void set_sizes(Chunk& chunk, const PosteriorArgs<float>& args) {
  chunk.K = static_cast<int>(args.K), chunk.width = round_up(chunk.K, 4);
  chunk.C = static_cast<int>(args.C), chunk.columns = round_up(chunk.C, 4);
}

// Column by column, rows of Δ from those of Z − W R: δ_t = (z_t − Rᵀ w_t) − Σ_{j < t} δ_j (c_j · w_t).
__device__ inline void substitute(const Chunk& chunk, float* rows) {
  for (int k = threadIdx.x; k < chunk.C; k += kThreads) {
    float column[kChunk];
#pragma unroll
    for (int t = 0; t < kChunk; ++t) {
      column[t] = 0;
      if (t >= chunk.count) continue;  // leaving the loop would keep it from being unrolled
      float sum = rows[t * chunk.columns + k];
#pragma unroll
      for (int j = 0; j < t; ++j) sum -= chunk.step[t][j] * column[j];
      rows[t * chunk.columns + k] = column[t] = sum;
    }
  }
}

__device__ inline bool seen(const PosteriorArgs<float>& args, int64_t b, int64_t t) {
  return !args.mask.data || *element(args.mask, b, t);
}

// Bring a chunk of patterns in, with zeros where the mask hides one: a hidden pattern may hold anything, even NaN.
__device__ inline void load_patterns(Chunk& chunk, const PosteriorArgs<float>& args, int64_t b, int64_t first) {
  if (threadIdx.x == 0) chunk.count = static_cast<int>(min(int64_t(kChunk), args.T_ - first));
  __syncthreads();
  const Codes values = codes_of(args.values, args.values_type, b);
  const int across = chunk.columns / 4;
  for (int n = threadIdx.x; n < kChunk * across; n += kThreads) {
    const int t = n / across, k = n % across * 4;
    const int room = t < chunk.count && seen(args, b, first + t) ? chunk.C - k : 0;
    reinterpret_cast<float4*>(chunk.values)[n] = values.four(first + t, k, values.inner, room);
  }
  if (threadIdx.x < chunk.count) {
    chunk.noise[threadIdx.x] = *element(args.noise_var, b, first + threadIdx.x);
    chunk.seen[threadIdx.x] = seen(args, b, first + threadIdx.x);
  }
  __syncthreads();
}

// A memory that cannot be addressed is left as it is.
__device__ inline void hide_patterns(Chunk& chunk) {
  if (threadIdx.x < kChunk) chunk.seen[threadIdx.x] = false;
  __syncthreads();
}

// Z to Δ, in place.
__device__ void whiten(Chunk& chunk) {
  product<kEither, 16, 128>(chunk.count, chunk.C, chunk.K, Side{chunk.w, chunk.width, 1}, transposed(chunk.mean), chunk,
                            false, [&](int i, int j, const auto& sums) {
                              float* const at = chunk.values + i * chunk.columns + j;
                              put_sum(at, at, 1, -1, sums, chunk.C - j);
                            });
  substitute(chunk, chunk.values);
  __syncthreads();
}

// Rows c_t to those of the gain, c_t √s_t.
__device__ inline void scale_rows(const Chunk& chunk, float* c) {
  for (int n = threadIdx.x; n < chunk.count * chunk.width; n += kThreads) c[n] *= sqrtf(chunk.s[n / chunk.width]);
  __syncthreads();
}

}  // namespace
}  // namespace fastkm
