// Runs CUDA kernels on the host: one fiber per CUDA thread. Fibers switch only where threads wait for one another.
//
// Thread blocks run one after another. A GPU leaves two orders open, and a seed draws them: the order of the thread
// blocks, and at each barrier the order of the threads. Shared memory holds NaN before a thread block starts.
//
// A launch ends in an error that names the source line if
//   - threads of a thread block wait at different barriers,
//   - a lane is missing from a warp operation or passes another mask,
//   - no thread can go on.
// AddressSanitizer reports every access outside global or shared memory. ThreadSanitizer reports every pair of accesses
// that only the schedule orders, also between thread blocks.
//
//   FASTKM_SIMT_SEED    0 in order (default), negative reversed, positive random
//   FASTKM_SIMT_SHARED  bytes of shared memory of a thread block (default: that of an H100)
//   FASTKM_SIMT_SMS     multiprocessors of the device (default 4)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace simt {

struct Index {
  unsigned x = 0;
};

// The operation for which the lanes of a warp exchange values.
enum class Exchange { kNothing, kXor, kIndex, kMultiply };

// The operands of one lane of a 16 × 8 × 8 product on tensor cores.
struct Fragments {
  float* sum;
  const uint32_t *a, *b;
};

void launch(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body);
float* shared_memory();
int64_t shared_limit();
int multiprocessors();

void wait_for_block(const char* file, int line);
uint64_t exchange(Exchange kind, unsigned mask, uint64_t value, int argument, const char* file, int line);
void fence();
unsigned add(unsigned* to, unsigned value);
[[noreturn]] void fail(const char* what, const char* file, int line);

template <class T>
T shuffle(Exchange kind, unsigned mask, T value, int argument, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane exchanges one value");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(kind, mask, bits, argument, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

// The runtime sets these whenever it switches to a thread.
extern simt::Index threadIdx, blockIdx, blockDim, gridDim;

#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_HERE) { simt::wait_for_block(file, line); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) {
  simt::exchange(simt::Exchange::kNothing, mask, 0, 0, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, SIMT_HERE) {
  return simt::shuffle(simt::Exchange::kXor, mask, value, lane_mask, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, SIMT_HERE) {
  return simt::shuffle(simt::Exchange::kIndex, mask, value, lane, file, line);
}
inline void __threadfence() { simt::fence(); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return simt::add(to, value); }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
