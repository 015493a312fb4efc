// kl_memory and logdet on a GPU: one block a memory, one launch.
#include "cuda/matrix_normal/divergence.cuh"

namespace fastkm {
namespace {

// Sums over a whole matrix are taken in double: what is wanted is their small difference.
__device__ double log_det(const Square& square, Block& block) {
  double sum = 0;
  for (int i = threadIdx.x; i < square.size; i += kThreads) sum += logf(square.data[int64_t(i) * (square.width + 1)]);
  return 2 * block_sum(sum, block);
}

__device__ double squared_norm(const float* m, int rows, int columns, int ld, Block& block) {
  double sum = 0;
  for (int64_t n = threadIdx.x; n < int64_t(rows) * columns; n += kThreads) {
    const double entry = m[n / columns * ld + n % columns];
    sum += entry * entry;
  }
  return block_sum(sum, block);
}

// Bytes: the covariance is read once, the least possible.
__global__ void __launch_bounds__(kThreads, 2)
    logdet_kernel(MatrixNormalArgs<float> args, int64_t B, Workspace workspace) {
  Distance& block = *reinterpret_cast<Distance*>(dynamic_shared());
  start(block, workspace, args.K, kLogdet);
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
    const int status = load_and_factor(block.cov, args.cov, b, block);
    const double result = log_det(block.cov, block);
    if (threadIdx.x == 0) {
      args.info[b] = status;
      args.result[b] = static_cast<float>(result);
    }
    __syncthreads();
  }
}

// ½ [C tr(U0⁻¹U) + tr(ΔᵀU0⁻¹Δ) − KC + C (ln|U0| − ln|U|)]; a trace is the squared norm of L0⁻¹L, or of L0⁻¹Δ.
//
// Bytes: both memories are read once, the least possible.
__global__ void __launch_bounds__(kThreads, 2) kl_kernel(MatrixNormalArgs<float> args, int64_t B, Workspace workspace) {
  Distance& block = *reinterpret_cast<Distance*>(dynamic_shared());
  start(block, workspace, args.K, kKl);
  const Square &cov = block.cov, &prior = block.prior;
  for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
#pragma unroll 1
    for (int of_prior = 0; of_prior < 2; ++of_prior) {
      const Square& square = of_prior ? prior : cov;
      const int status = load_and_factor(square, of_prior ? args.prior_cov : args.cov, b, block);
      const double own = log_det(square, block);
      if (threadIdx.x == 0) {
        block.worst = of_prior ? max(status, block.worst) : status;
        block.growth = of_prior ? own - block.growth : own;
      }
    }

    for (int64_t n = threadIdx.x; n < int64_t(cov.size) * cov.width; n += kThreads)
      if (n % cov.width > n / cov.width) cov.data[n] = 0;
    __syncthreads();
    solve_lower(prior, cov.data, cov.width, cov.size);
    const double trace = squared_norm(cov.data, cov.size, cov.size, cov.width, block);

    double distance = 0;
    for (int first = 0; first < args.C; first += kColumns) {
      const int count = load_shift(block.tile, args, b, first);
      solve_lower(prior, block.tile, kColumns, count);
      distance += squared_norm(block.tile, cov.size, count, kColumns, block);
    }
    if (threadIdx.x == 0) {
      const double columns = static_cast<double>(args.C), rows = static_cast<double>(args.K);
      args.info[b] = block.worst;
      args.result[b] = static_cast<float>(0.5 * (columns * (trace - rows + block.growth) + distance));
    }
    __syncthreads();
  }
}

}  // namespace

namespace cuda {

const char* logdet(const MatrixNormalArgs<float>& args, int64_t B, Context& context) {
  return run(logdet_kernel, kLogdet, args.K, B, context, args);
}

const char* kl_memory(const MatrixNormalArgs<float>& args, int64_t B, Context& context) {
  return run(kl_kernel, kKl, args.K, B, context, args);
}

}  // namespace cuda
}  // namespace fastkm
