// Backward of kl_memory and logdet on a GPU: one thread block a memory, one launch.
//
// With g the cotangent of the result and Δ = R − R0, E = U0⁻¹ Δ, P = U0⁻¹ (U0 − U):
//   (1)  of ln|U|:  Ū = g U⁻¹, a tile of columns at a time
//   (2)  of KL:     R̄ = g E = −R̄0      Ū = ½ g C (U0⁻¹ − U⁻¹) = −½ g C P U⁻¹
//                   Ū0 = ½ g (C (U0⁻¹ − U0⁻¹ U U0⁻¹) − E Eᵀ) = ½ g (C P U0⁻¹ − E Eᵀ)
// A posterior is often close to its prior. Subtracting two inverses would then leave mostly their rounding, so both
// differences start from P. Without a factor all cotangents are NaN.
//
// Bytes: everything is read and every cotangent written once, the least possible. The backward of KL reads the
// covariances a second time.
#include "cuda/linalg/product.cuh"
#include "cuda/matrix_normal/divergence.cuh"

namespace fastkm {
namespace {

__device__ void factor_or_poison(const Factor& factor, const Batch<const float>& cov, int64_t b,
                                 ThreadBlock& thread_block) {
  if (load_and_factor(factor, cov, b, thread_block) != kGood) poison_factor(factor);
}

// P into `difference`, from the lower triangles: the divergence reads these.
__device__ void solve_difference(Divergence& divergence, const MatrixNormalArgs<float>& args, int64_t b) {
  const int K = divergence.cov.size, width = divergence.cov.width;
  for (int64_t n = threadIdx.x; n < int64_t(K) * K; n += kThreads) {
    const int64_t row = max(n / K, n % K), column = min(n / K, n % K);
    divergence.difference[n / K * width + n % K] =
        *element(args.prior_cov, b, row, column) - *element(args.cov, b, row, column);
  }
  __syncthreads();
  solve_cholesky(divergence.difference, width, K, divergence.prior);
}

// Ū = −½ g C U⁻¹ Pᵀ, from Pᵀ in `difference`.
__device__ __forceinline__ void store_grad_cov(Divergence& divergence, const Batch<float>& to_cov, int64_t b,
                                               float factor) {
  const Factor& cov = divergence.cov;
  const int K = cov.size, width = cov.width;
  float* const result = element(to_cov, b);
  for (int first = 0; first < K; first += kColumns) {
    const int count = min(kColumns, K - first);
    for (int n = threadIdx.x; n < K * kColumns; n += kThreads) {
      const int row = n / kColumns, column = n % kColumns;
      divergence.tile[n] = column < count ? divergence.difference[int64_t(row) * width + first + column] : 0;
    }
    __syncthreads();
    solve_cholesky(divergence.tile, kColumns, count, cov);
    for (int n = threadIdx.x; n < K * count; n += kThreads) {
      const int row = n / count, column = n % count;
      if (first + column > row) continue;
      const float entry = factor * divergence.tile[row * kColumns + column];
      result[row * to_cov.stride[1] + (first + column) * to_cov.stride[2]] = entry;
      result[(first + column) * to_cov.stride[1] + row * to_cov.stride[2]] = entry;
    }
    __syncthreads();
  }
}

// R̄ = g E = −R̄0, and `difference` loses E Eᵀ.
__device__ __forceinline__ void store_grad_means(Divergence& divergence, const MatrixNormalArgs<float>& args,
                                                 const MatrixNormalGrads<float>& grads, int64_t b, float g) {
  const int K = divergence.cov.size, width = divergence.cov.width;
  for (int first = 0; first < args.C; first += kColumns) {
    const int count = load_mean_difference(divergence.tile, args, b, first);
    solve_cholesky(divergence.tile, kColumns, count, divergence.prior);
    for (int n = threadIdx.x; n < K * count; n += kThreads) {
      const int row = n / count, column = n % count;
      const float entry = g * divergence.tile[row * kColumns + column];
      *element(grads.to_mean, b, row, first + column) = entry;
      *element(grads.to_prior_mean, b, row, first + column) = -entry;
    }
    const Operand solved{divergence.tile, kColumns, 1};
    product<kCudaCores, 64, 64>(AddRows{divergence.difference, width, K, -1}, {K, K, count, true}, solved, solved,
                                divergence);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    kl_backward_kernel(MatrixNormalArgs<float> args, MatrixNormalGrads<float> grads, int64_t B, Workspace workspace) {
  Divergence& divergence = *reinterpret_cast<Divergence*>(dynamic_shared());
  set_buffers(divergence, workspace, args.K, kKlBackward);
  const Factor &cov = divergence.cov, &prior = divergence.prior;
  const int K = cov.size, width = cov.width;
  float* const difference = divergence.difference;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
#pragma unroll 1
    for (int of_prior = 0; of_prior < 2; ++of_prior)
      factor_or_poison(of_prior ? prior : cov, of_prior ? args.prior_cov : args.cov, b, divergence);
    const float g = *element(grads.result, b), columns = static_cast<float>(args.C);
    solve_difference(divergence, args, b);
    transpose_in_place(difference, K, width);
    store_grad_cov(divergence, grads.to_cov, b, -0.5f * g * columns);

    // Ū0 = ½ g (C U0⁻¹ Pᵀ − E Eᵀ)
    solve_cholesky(difference, width, K, prior);
    for (int64_t n = threadIdx.x; n < int64_t(K) * width; n += kThreads) difference[n] *= columns;
    __syncthreads();
    store_grad_means(divergence, args, grads, b, g);
    store_mirrored(grads.to_prior_cov, b, difference, K, width, 0.5f * g);
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    logdet_backward_kernel(MatrixNormalArgs<float> args, MatrixNormalGrads<float> grads, int64_t B,
                           Workspace workspace) {
  Divergence& divergence = *reinterpret_cast<Divergence*>(dynamic_shared());
  set_buffers(divergence, workspace, args.K, kKl);
  const Factor& cov = divergence.cov;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    factor_or_poison(cov, args.cov, b, divergence);
    const float g = *element(grads.result, b);
    for (int first = 0; first < cov.size; first += kColumns) {
      const int count = min(kColumns, cov.size - first);
      for (int n = threadIdx.x; n < cov.size * kColumns; n += kThreads)
        divergence.tile[n] = n / kColumns == first + n % kColumns ? g : 0;
      __syncthreads();
      solve_cholesky(divergence.tile, kColumns, count, cov);
      for (int n = threadIdx.x; n < cov.size * count; n += kThreads) {
        const int row = n / count, column = first + n % count;
        if (column > row) continue;
        const float entry = divergence.tile[row * kColumns + n % count];
        *element(grads.to_cov, b, row, column) = *element(grads.to_cov, b, column, row) = entry;
      }
      __syncthreads();
    }
  }
}

}  // namespace

const char* cuda::logdet_backward(const MatrixNormalArgs<float>& args, const MatrixNormalGrads<float>& grads, int64_t B,
                                  Context& context) {
  return run(logdet_backward_kernel, kKl, args.K, B, context, args, grads);
}

const char* cuda::kl_memory_backward(const MatrixNormalArgs<float>& args, const MatrixNormalGrads<float>& grads,
                                     int64_t B, Context& context) {
  return run(kl_backward_kernel, kKlBackward, args.K, B, context, args, grads);
}

}  // namespace fastkm
