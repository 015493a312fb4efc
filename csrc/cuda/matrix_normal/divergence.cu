// kl_memory, logdet and their backward on a GPU: one block a memory, one launch.
#include "cuda/linalg/dense.cuh"

namespace fastkm {
namespace {

constexpr int kColumns = 64;  // of the means, brought in at once

struct Distance : Block {
  int worst;      // status of the covariances
  double growth;  // ln|U0| − ln|U|
  Square cov, prior;
  float *gap, *tile;
};

enum Task { kLogdet, kKl, kKlBackward };

// Where the buffers of a block are; most used first.
__host__ __device__ void lay_out(Distance& block, Space& space, int64_t rows, Task task) {
  const int K = static_cast<int>(rows), width = round_up(K, 4);
  const auto square = [&] {
    float* const data = space.take(int64_t(width) * width);
    return Square{data, space.take(Square::root_floats(K)), K, width};
  };
  block.cov = square();
  if (task == kLogdet) return;
  block.prior = square();
  block.tile = space.take(int64_t(width) * kColumns);
  if (task == kKlBackward) block.gap = space.take(int64_t(width) * width);
}

__device__ void start(Distance& block, const Workspace& workspace, int64_t K, Task task) {
  if (threadIdx.x == 0) {
    Space space = space_of_block<Distance>(workspace);
    lay_out(block, space, K, task);
  }
  __syncthreads();
}

// The factor of memory b's covariance, and its status.
__device__ int load_and_factor(const Square& square, const Batch<const float>& cov, int64_t b, Block& block) {
  load_rows(square.data, square.size, square.size, square.width, square.width, side_of(cov, b));
  __syncthreads();
  check_symmetry(square.data, square.size, square.width, block);
  const int symmetric = block.status;
  cholesky(square, block);
  const int status = symmetric != kGood ? symmetric : block.positive ? kGood : kNotPositiveDefinite;
  __syncthreads();
  return status;
}

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

// Columns [first, first + kColumns) of R − R0; returns how many there are.
__device__ int load_shift(float* tile, const MatrixNormalArgs<float>& args, int64_t b, int first) {
  const int K = static_cast<int>(args.K), count = min(kColumns, static_cast<int>(args.C) - first);
  const Side mean = side_of(args.mean, b), prior = side_of(args.prior_mean, b);
  for (int n = threadIdx.x; n < K * (kColumns / 4); n += kThreads) {
    const int row = n / (kColumns / 4), column = n % (kColumns / 4) * 4;
    const float4 left = mean.four(row, first + column, mean.inner, count - column);
    const float4 right = prior.four(row, first + column, prior.inner, count - column);
    reinterpret_cast<float4*>(tile)[n] = {left.x - right.x, left.y - right.y, left.z - right.z, left.w - right.w};
  }
  __syncthreads();
  return count;
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

// Without a factor there is no gradient.
__device__ void poison(const Square& square) {
  for (int64_t n = threadIdx.x; n < Square::root_floats(square.size); n += kThreads)
    square.roots[n] = __uint_as_float(0x7FC00000u);
  __syncthreads();
}

__device__ void factor_or_poison(const Square& square, const Batch<const float>& cov, int64_t b, Block& block) {
  if (load_and_factor(square, cov, b, block) != kGood) poison(square);
}

__device__ void store_mirrored(const Batch<float>& to, int64_t b, const float* m, int size, int width, float factor) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    *element(to, b, i, j) = factor * (j <= i ? m[i * width + j] : m[j * width + i]);
  }
}

__device__ void transpose_in_place(float* m, int size, int width) {
  for (int64_t n = threadIdx.x; n < int64_t(size) * size; n += kThreads) {
    const int64_t i = n / size, j = n % size;
    if (j >= i) continue;
    const float lower = m[i * width + j];
    m[i * width + j] = m[j * width + i];
    m[j * width + i] = lower;
  }
  __syncthreads();
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

// Sizes, workspace, and one launch over the memories.
template <class Kernel, class... Arguments>
const char* run(Kernel kernel, Task task, int64_t K, int64_t B, cuda::Context& context, const Arguments&... arguments) {
  if (B == 0) return nullptr;
  const Device device = current_device();
  Workspace workspace = measure<Distance>(device, [&](Distance& head, Space& space) { lay_out(head, space, K, task); });
  const int64_t blocks = min(B, resident_blocks(device, kernel, workspace));
  if (workspace.block_floats > 0) workspace.data = context.allocate(context, blocks * workspace.block_floats);
  return launch(kernel, blocks, kThreads, workspace.shared_bytes(), context.stream, arguments..., B, workspace);
}

}  // namespace

namespace cuda {

const char* logdet(const MatrixNormalArgs<float>& args, int64_t B, Context& context) {
  return run(logdet_kernel, kLogdet, args.K, B, context, args);
}

const char* kl_memory(const MatrixNormalArgs<float>& args, int64_t B, Context& context) {
  return run(kl_kernel, kKl, args.K, B, context, args);
}

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
