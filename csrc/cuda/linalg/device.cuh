// Everything in which the build for a device and the build for the host differ.
//
// With FASTKM_SIMT a C++ compiler compiles the same sources against tests/simt/simt.h, which runs every CUDA thread as
// a fiber. Each PTX instruction is one function here, with a model of it for the host.
#pragma once

#include <cstdint>
#include <limits>

#ifdef FASTKM_SIMT
#include "simt.h"
#define FASTKM_OUT_OF_LINE
#define FASTKM_IN_PLACE const
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FASTKM_OUT_OF_LINE __noinline__          // a call: the caller keeps its own registers
#define FASTKM_IN_PLACE const __grid_constant__  // a reference to the parameter needs no copy on the stack
#endif

namespace fastkm {
namespace {

// What a launcher needs to know about a device.
struct Device {
  int64_t shared_bytes;  // the most that one thread block may have
  int multiprocessors;
};

#ifdef FASTKM_SIMT

inline float* dynamic_shared() { return simt::shared_memory(); }

inline Device current_device() { return {simt::shared_limit(), simt::multiprocessors()}; }

// Thread blocks of a kernel that run on a multiprocessor at the same time. The host does not know register counts. It
// assumes one: most kernels here use over 128 registers in each of 256 threads.
template <class Kernel>
int blocks_per_multiprocessor(Kernel, int, int64_t) {
  return 1;
}

// Run `blocks` thread blocks of the kernel. Returns an error in words, or null.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void*,
                   const Arguments&... arguments) {
  simt::launch(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
  return nullptr;
}

inline const char* fill_zero_bytes(void* at, int64_t bytes, void*) {
  std::memset(at, 0, static_cast<size_t>(bytes));
  return nullptr;
}

inline uint32_t to_tf32(float x) {  // to nearest, ties away from zero
  return (__float_as_uint(x) + 0x1000u) & 0xFFFFE000u;
}

inline void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_HERE) {
  const simt::Fragments fragments{sum, a, b};
  simt::exchange(simt::Exchange::kMultiply, ~0u, reinterpret_cast<uint64_t>(&fragments), 0, file, line);
}

inline float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}

#else

__device__ inline float* dynamic_shared() {
  extern __shared__ __align__(16) float shared[];
  return shared;
}

inline Device current_device() {
  int device = 0, shared_bytes = 0, multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return {shared_bytes, multiprocessors};
}

template <class Kernel>
cudaError_t allow_shared_memory(Kernel kernel, int64_t shared_bytes) {
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  return cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared_bytes));
}

// The driver counts them from registers, threads and shared memory. If it finds none the answer is one, so that the
// launch runs and reports the error.
template <class Kernel>
int blocks_per_multiprocessor(Kernel kernel, int threads, int64_t shared_bytes) {
  int blocks = 0;
  cudaError_t error = allow_shared_memory(kernel, shared_bytes);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes));
  return error == cudaSuccess && blocks > 0 ? blocks : 1;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  cudaError_t error = allow_shared_memory(kernel, shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline const char* fill_zero_bytes(void* at, int64_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// sum += a b for a [16, 8] and b [8, 8], by one warp. With group = lane / 4 and member = lane % 4 a lane holds
//   a (group, member), (group + 8, member), (group, member + 4), (group + 8, member + 4)
//   b (member, group), (member + 4, group)
//   sum (group, 2 member), (group, 2 member + 1), and the same columns eight rows below.
__device__ inline void mma_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

#endif

}  // namespace
}  // namespace fastkm
