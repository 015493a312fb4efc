// Small kernels with planted bugs of the kinds that a GPU hides. The number on the command line chooses one bug for the
// checkers to find; 0 runs the same code without a bug.
#include <cstdio>
#include <cstdlib>

#include "cuda/linalg/product.cuh"
#include "cuda/linalg/reduce.cuh"

namespace fastkm {
namespace {

enum Bug {
  kNone,
  kMissingBarrier,
  kWarpSynchronousTail,
  kDivergentBarrier,
  kBadMask,
  kSharedOutOfBounds,
  kGlobalOutOfBounds,
  kRaceBetweenBlocks,
  kMissingFence,
  kStageReusedTooEarly,
  kSwappedFragments,
  kUnwritten,
  kBugs
};

// Σ of a row, one thread block a row, by halves.
template <Bug kBug>
__global__ void sum_rows(const float* rows, float* sums, int length) {
  float* const part = dynamic_shared();
  float mine = 0;
  const int end = length + (kBug == kGlobalOutOfBounds && blockIdx.x + 1 == gridDim.x ? 1 : 0);
  for (int i = threadIdx.x; i < end; i += kThreads) mine += rows[int64_t(blockIdx.x) * length + i];
  if (!(kBug == kUnwritten && threadIdx.x == 100)) part[threadIdx.x] = mine;
  if (kBug != kMissingBarrier) __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    if (kBug == kWarpSynchronousTail && half <= 16) continue;
    if (kBug == kDivergentBarrier && threadIdx.x >= half) break;
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = part[kBug == kSharedOutOfBounds ? kThreads + blockIdx.x : 0];
}

// Σ of everything: a thread block sums its part, the last one to finish sums the parts.
template <Bug kBug>
__global__ void sum_all(const float* values, float* parts, unsigned* ticket, float* total, int length) {
  ThreadBlock& thread_block = *reinterpret_cast<ThreadBlock*>(dynamic_shared());
  float mine = 0;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < length; i += gridDim.x * kThreads) mine += values[i];
  for (int offset = 16; offset > 0; offset /= 2) {
    if (kBug == kBadMask && threadIdx.x % 32 >= 16) continue;
    mine += __shfl_xor_sync(~0u, mine, offset);
  }
  if (threadIdx.x % 32 == 0) thread_block.warp_part[threadIdx.x / 32][0] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += thread_block.warp_part[warp][0];
    parts[blockIdx.x] = sum;
    if (kBug == kRaceBetweenBlocks) *total = (blockIdx.x == 0 ? 0 : *total) + sum;
    if (kBug == kMissingFence) thread_block.last = atomicAdd(ticket, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (kBug == kRaceBetweenBlocks) return;
  const bool last = kBug == kMissingFence ? thread_block.last : last_to_arrive(ticket, gridDim.x, thread_block);
  if (last && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned part = 0; part < gridDim.x; ++part) sum += parts[part];
    *total = sum;
  }
}

// C = A Bᵀ for a result [16, 128], a slice at a time through one stage.
template <Bug kBug>
__global__ void product_by_slices(const float* a, const float* b, float* c, int length) {
  ThreadBlock& thread_block = *reinterpret_cast<ThreadBlock*>(dynamic_shared());
  if (threadIdx.x == 0) thread_block.precision = kTf32x3;
  __syncthreads();
  constexpr int kLdA = SliceLoader<16>::kLd, kLdB = SliceLoader<128>::kLd;
  float *stage_a = thread_block.stage, *stage_b = thread_block.stage + kSlice * kLdA;
  TensorTile<16, 128> tile;
  for (int k = 0; k < length; k += kSlice) {
    if (kBug != kStageReusedTooEarly) __syncthreads();
    for (int n = threadIdx.x; n < 16 * kSlice; n += kThreads)
      stage_a[n % kSlice * kLdA + n / kSlice] = a[n / kSlice * length + k + n % kSlice];
    for (int n = threadIdx.x; n < 128 * kSlice; n += kThreads)
      stage_b[n % kSlice * kLdB + n / kSlice] = b[n / kSlice * length + k + n % kSlice];
    __syncthreads();
    tile.add(stage_a, kLdA, stage_b, kLdB, thread_block);
  }
  tile.store([&](int i, int j, const auto& values) {
    for (int n = 0; n < 2; ++n) c[(kBug == kSwappedFragments ? (i + 8) % 16 : i) * 128 + j + n] = values[n];
  });
}

bool wrong(float got, double expected) { return !(std::abs(got - expected) <= 1e-4 * (1 + std::abs(expected))); }

template <Bug kBug>
int run() {
  constexpr int kRows = 4, kLength = 700, kInner = 48;
  const auto draw = [](int64_t count) {
    float* const values = new float[count];
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>((i * 2654435761u >> 8) % 1000) / 500 - 1;
    return values;
  };
  float* const values = draw(kRows * kLength);
  float *sums = new float[kRows], *parts = new float[kRows], total = 0;
  unsigned* const ticket = new unsigned(0);
  launch(sum_rows<kBug>, kRows, kThreads, kThreads * sizeof(float), nullptr, values, sums, kLength);
  launch(sum_all<kBug>, kRows, kThreads, sizeof(ThreadBlock), nullptr, values, parts, ticket, &total, kRows * kLength);
  double all = 0;
  int failures = 0;
  for (int row = 0; row < kRows; ++row) {
    double sum = 0;
    for (int i = 0; i < kLength; ++i) sum += values[row * kLength + i];
    failures += wrong(sums[row], sum);
    all += sum;
  }
  failures += wrong(total, all);

  const float *a = draw(16 * kInner), *b = draw(128 * kInner);
  float* const c = new float[16 * 128];
  launch(product_by_slices<kBug>, 1, kThreads, sizeof(ThreadBlock), nullptr, a, b, c, kInner);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 128; ++j) {
      double sum = 0;
      for (int k = 0; k < kInner; ++k) sum += double(a[i * kInner + k]) * b[j * kInner + k];
      failures += wrong(c[i * 128 + j], sum);
    }
  std::printf(failures ? "%d wrong results\n" : "clean\n", failures);
  return failures ? 1 : 0;
}

template <int... kNumbers>
int choose(int bug, std::integer_sequence<int, kNumbers...>) {
  int result = 2;
  ((bug == kNumbers ? void(result = run<Bug(kNumbers)>()) : void()), ...);
  return result;
}

}  // namespace
}  // namespace fastkm

int main(int, char** arguments) {
  try {
    return fastkm::choose(std::atoi(arguments[1]), std::make_integer_sequence<int, fastkm::kBugs>());
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
