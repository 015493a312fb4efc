// The CUDA kernels as the bindings see them. No torch and no CUDA here: a launcher takes the arguments of kernels.h,
// with float32 memories on the device of the stream, and returns what went wrong in words, or null.
#pragma once

#include "kernels.h"

namespace fastkm::cuda {

// Where a launch runs, and where its workspace comes from: `floats` of device memory, on 16 bytes, that live until the
// stream has passed.
struct Context {
  void* stream = nullptr;
  float* (*allocate)(Context&, int64_t floats) = nullptr;
};

const char* kl_memory(const MatrixNormalArgs<float>&, int64_t B, Context&);
const char* logdet(const MatrixNormalArgs<float>&, int64_t B, Context&);
const char* kl_memory_backward(const MatrixNormalArgs<float>&, const MatrixNormalGrads<float>&, int64_t B, Context&);
const char* logdet_backward(const MatrixNormalArgs<float>&, const MatrixNormalGrads<float>&, int64_t B, Context&);

}  // namespace fastkm::cuda
