// kl_memory and logdet on a GPU: one thread block a memory, one launch.
//
// With U = L Lᵀ, U0 = L0 L0ᵀ and Δ = R − R0:
//   (1)  ln|U| = 2 Σ ln L_ii
//   (2)  KL = ½ [C tr(U0⁻¹ U) + tr(Δᵀ U0⁻¹ Δ) − K C + C (ln|U0| − ln|U|)]
//   (3)  tr(U0⁻¹ U) = ‖L0⁻¹ L‖²      tr(Δᵀ U0⁻¹ Δ) = ‖L0⁻¹ Δ‖², on a tile of columns of Δ at a time
// With M = L0⁻¹ L and D its diagonal, whose entries are m_i = L_ii/L0_ii, the KL is a sum of terms that are not
// negative:
//   (4)  KL = ½ [C (Σ (m_i² − 1 − ln m_i²) + ‖M − D‖²) + ‖L0⁻¹ Δ‖²]      M − D = L0⁻¹ (L − L0 D)
// Sums over a whole matrix are in double.
//
// Bytes: every covariance and mean is read once, the least possible.
#include "cuda/matrix_normal/divergence.cuh"

namespace fastkm {
namespace {

__device__ double log_det(const Factor& factor, ThreadBlock& thread_block) {
  double sum = 0;
  for (int i = threadIdx.x; i < factor.size; i += kThreads) sum += logf(factor.data[int64_t(i) * (factor.width + 1)]);
  return 2 * block_sum(sum, thread_block);
}

__device__ double squared_norm(const float* m, int rows, int columns, int ld, ThreadBlock& thread_block) {
  double sum = 0;
  for (int64_t n = threadIdx.x; n < int64_t(rows) * columns; n += kThreads) {
    const double entry = m[n / columns * ld + n % columns];
    sum += entry * entry;
  }
  return block_sum(sum, thread_block);
}

__global__ void __launch_bounds__(kThreads, 2)
    logdet_kernel(MatrixNormalArgs<float> args, int64_t B, Workspace workspace) {
  Divergence& divergence = *reinterpret_cast<Divergence*>(dynamic_shared());
  set_buffers(divergence, workspace, args.K, kLogdet);
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    const int status = load_and_factor(divergence.cov, args.cov, b, divergence);
    const double result = log_det(divergence.cov, divergence);
    if (threadIdx.x == 0) {
      args.info[b] = status;
      args.result[b] = static_cast<float>(result);
    }
    __syncthreads();
  }
}

// Σ (m_i² − 1 − ln m_i²), and L − L0 D in the place of L. Leaves m in `tile`. This thread's part of the sum.
__device__ double relative_factor(const Factor& cov, const Factor& prior, float* tile) {
  double sum = 0;
  for (int i = threadIdx.x; i < cov.size; i += kThreads) {
    const int64_t at = int64_t(i) * (cov.width + 1);
    const float own = cov.data[at], other = prior.data[at], m = own / other, gap = (own - other) / other;
    tile[i] = m;
    sum += variance_divergence(m * m, gap * (2 + gap));
  }
  __syncthreads();
  for (int64_t n = threadIdx.x; n < int64_t(cov.size) * cov.width; n += kThreads) {
    const int64_t row = n / cov.width, column = n % cov.width;
    cov.data[n] = column < row ? cov.data[n] - prior.data[n] * tile[column] : 0;
  }
  __syncthreads();
  return sum;
}

__global__ void __launch_bounds__(kThreads, 2) kl_kernel(MatrixNormalArgs<float> args, int64_t B, Workspace workspace) {
  Divergence& divergence = *reinterpret_cast<Divergence*>(dynamic_shared());
  set_buffers(divergence, workspace, args.K, kKl);
  const Factor &cov = divergence.cov, &prior = divergence.prior;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
#pragma unroll 1
    for (int of_prior = 0; of_prior < 2; ++of_prior) {
      const Factor& factor = of_prior ? prior : cov;
      const int status = load_and_factor(factor, of_prior ? args.prior_cov : args.cov, b, divergence);
      if (threadIdx.x == 0) divergence.worst = of_prior ? max(status, divergence.worst) : status;
    }
    const double mine = relative_factor(cov, prior, divergence.tile);
    double spread = block_sum(mine, divergence);
    solve_lower(cov.data, cov.width, cov.size, prior);
    spread += squared_norm(cov.data, cov.size, cov.size, cov.width, divergence);
    double distance = 0;
    for (int first = 0; first < args.C; first += kColumns) {
      const int count = load_mean_difference(divergence.tile, args, b, first);
      solve_lower(divergence.tile, kColumns, count, prior);
      distance += squared_norm(divergence.tile, cov.size, count, kColumns, divergence);
    }
    if (threadIdx.x == 0) {
      args.info[b] = divergence.worst;
      args.result[b] = static_cast<float>(0.5 * (static_cast<double>(args.C) * spread + distance));
    }
    __syncthreads();
  }
}

}  // namespace

const char* cuda::logdet(const MatrixNormalArgs<float>& args, int64_t B, Context& context) {
  return run(logdet_kernel, kLogdet, args.K, B, context, args);
}

const char* cuda::kl_memory(const MatrixNormalArgs<float>& args, int64_t B, Context& context) {
  return run(kl_kernel, kKl, args.K, B, context, args);
}

}  // namespace fastkm
