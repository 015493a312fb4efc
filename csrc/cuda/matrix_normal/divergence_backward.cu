// Backward of kl_memory and logdet on a GPU: one block a memory, one launch.
#include "cuda/linalg/product.cuh"
#include "cuda/matrix_normal/divergence.cuh"

namespace fastkm {
namespace {

// Without a factor there is no gradient.
__device__ void poison(const Square& square) {
  for (int64_t n = threadIdx.x; n < Square::root_floats(square.size); n += kThreads)
    square.roots[n] = __uint_as_float(0x7FC00000u);
  __syncthreads();
}

__device__ void factor_or_poison(const Square& square, const Batch<const float>& cov, int64_t b, Block& block) {
  if (load_and_factor(square, cov, b, block) != kGood) poison(square);
}

// With g the cotangent of the divergence and E = U0⁻¹Δ: R̄ = g E = −R̄0, Ū = ½ g C (U0⁻¹ − U⁻¹) and
// Ū0 = ½ g (C (U0⁻¹ − U0⁻¹ U U0⁻¹) − E Eᵀ). Both differences start from P = U0⁻¹ (U0 − U), as −P U⁻¹ and P U0⁻¹:
// a posterior is often close to its prior, and subtracting two inverses would then leave their rounding.
//
// Bytes: both memories are read and their cotangents written once, the least possible; the covariances are read once
// more, and of the first mean's cotangent, E is read once more.
__global__ void __launch_bounds__(kThreads, 1)
    kl_backward_kernel(MatrixNormalArgs<float> args, MatrixNormalGrads<float> grads, int64_t B, Workspace workspace) {
  Distance& block = *reinterpret_cast<Distance*>(dynamic_shared());
  start(block, workspace, args.K, kKlBackward);
  const Square &cov = block.cov, &prior = block.prior;
  const int K = cov.size, width = cov.width;
  float* const gap = block.gap;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
#pragma unroll 1
    for (int of_prior = 0; of_prior < 2; ++of_prior)
      factor_or_poison(of_prior ? prior : cov, of_prior ? args.prior_cov : args.cov, b, block);
    const float g = *element(grads.result, b), columns = static_cast<float>(args.C);

    // P, from the lower triangles, which are what the divergence reads.
    for (int64_t n = threadIdx.x; n < int64_t(K) * K; n += kThreads) {
      const int64_t row = max(n / K, n % K), column = min(n / K, n % K);
      gap[n / K * width + n % K] = *element(args.prior_cov, b, row, column) - *element(args.cov, b, row, column);
    }
    __syncthreads();
    solve(prior, gap, width, K);
    transpose_in_place(gap, K, width);  // Pᵀ

    // Ū = −½ g C U⁻¹ Pᵀ; the space of the factor is free afterwards.
    const Batch<float>& to_cov = grads.to_cov;
    float* const own = element(to_cov, b);
    for (int first = 0; first < K; first += kColumns) {
      const int count = min(kColumns, K - first);
      for (int n = threadIdx.x; n < K * kColumns; n += kThreads) {
        const int row = n / kColumns, column = n % kColumns;
        block.tile[n] = column < count ? gap[int64_t(row) * width + first + column] : 0;
      }
      __syncthreads();
      solve(cov, block.tile, kColumns, count);
      for (int n = threadIdx.x; n < K * count; n += kThreads) {
        const int row = n / count, column = n % count;
        if (first + column > row) continue;
        const float entry = -0.5f * g * columns * block.tile[row * kColumns + column];
        own[row * to_cov.stride[1] + (first + column) * to_cov.stride[2]] = entry;
        own[(first + column) * to_cov.stride[1] + row * to_cov.stride[2]] = entry;
      }
      __syncthreads();
    }

    // Ū0 = ½ g (C U0⁻¹ Pᵀ − E Eᵀ), and both means.
    solve(prior, gap, width, K);
    for (int64_t n = threadIdx.x; n < int64_t(K) * width; n += kThreads) gap[n] *= columns;
    __syncthreads();
    for (int first = 0; first < args.C; first += kColumns) {
      const int count = load_shift(block.tile, args, b, first);
      solve(prior, block.tile, kColumns, count);
      for (int n = threadIdx.x; n < K * count; n += kThreads) {
        const int row = n / count, column = n % count;
        const float entry = g * block.tile[row * kColumns + column];
        *element(grads.to_mean, b, row, first + column) = entry;
        *element(grads.to_prior_mean, b, row, first + column) = -entry;
      }
      const Side pull{block.tile, kColumns, 1};
      product<kExact, 64, 64>(K, K, count, pull, pull, block, true, [&](int i, int j, const auto& sums) {
        float* const at = gap + int64_t(i) * width + j;
        put_sum(at, at, 1, -1, sums, K - j);
      });
    }
    store_mirrored(grads.to_prior_cov, b, gap, K, width, 0.5f * g);
    __syncthreads();
  }
}

// Ū = g U⁻¹, column tile by column tile.
//
// Bytes: the covariance is read and its cotangent written once, the least possible.
__global__ void __launch_bounds__(kThreads, 2)
    logdet_backward_kernel(MatrixNormalArgs<float> args, MatrixNormalGrads<float> grads, int64_t B,
                           Workspace workspace) {
  Distance& block = *reinterpret_cast<Distance*>(dynamic_shared());
  start(block, workspace, args.K, kKl);
  const Square& cov = block.cov;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    factor_or_poison(cov, args.cov, b, block);
    const float g = *element(grads.result, b);
    for (int first = 0; first < cov.size; first += kColumns) {
      const int count = min(kColumns, cov.size - first);
      for (int n = threadIdx.x; n < cov.size * kColumns; n += kThreads)
        block.tile[n] = n / kColumns == first + n % kColumns ? g : 0;
      __syncthreads();
      solve(cov, block.tile, kColumns, count);
      for (int n = threadIdx.x; n < cov.size * count; n += kThreads) {
        const int row = n / count, column = first + n % count;
        if (column > row) continue;
        const float entry = block.tile[row * kColumns + n % count];
        *element(grads.to_cov, b, row, column) = *element(grads.to_cov, b, column, row) = entry;
      }
      __syncthreads();
    }
  }
}

}  // namespace

namespace cuda {

const char* logdet_backward(const MatrixNormalArgs<float>& args, const MatrixNormalGrads<float>& grads, int64_t B,
                            Context& context) {
  return run(logdet_backward_kernel, kKl, args.K, B, context, args, grads);
}

const char* kl_memory_backward(const MatrixNormalArgs<float>& args, const MatrixNormalGrads<float>& grads, int64_t B,
                               Context& context) {
  return run(kl_backward_kernel, kKlBackward, args.K, B, context, args, grads);
}

}  // namespace cuda
}  // namespace fastkm
