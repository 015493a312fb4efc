// The launchers of the CUDA kernels. This header includes neither torch nor CUDA. A launcher takes the arguments of
// kernel_args.h with float32 memories on the device of the stream, and returns an error in words, or null.
#pragma once

#include "kernel_args.h"

namespace fastkm::cuda {

// The stream of a launch and the source of its workspace: `allocate` returns device memory, aligned to 16 bytes, that
// lives until the stream has run the launch.
struct Context {
  void* stream = nullptr;
  float* (*allocate)(Context&, int64_t floats) = nullptr;
};

const char* update_posterior(const PosteriorArgs<float>&, int64_t B, Context&);
const char* update_posterior_backward(const PosteriorArgs<float>&, const PosteriorGrads<float>&, int64_t B, Context&);
const char* remove_patterns(const PosteriorArgs<float>&, int64_t B, Context&);
const char* remove_patterns_backward(const PosteriorArgs<float>&, const PosteriorGrads<float>&, int64_t B, Context&);
const char* replace_patterns(const PosteriorArgs<float>& update, const PosteriorArgs<float>& removal, int64_t B,
                             Context&);
const char* write(const WritingArgs<float>&, int64_t B, Context&);
const char* write_backward(const WritingArgs<float>&, const WritingGrads<float>&, int64_t B, Context&);
const char* filter_posterior(const FilteringArgs<float>&, int64_t B, Context&);
const char* filter_posterior_backward(const FilteringArgs<float>&, const FilteringGrads<float>&, int64_t B, Context&);
const char* read(const ReadingArgs<float>&, int64_t B, Context&);
const char* read_backward(const ReadingArgs<float>&, const ReadingGrads<float>&, int64_t B, Context&);
const char* factor_addressing(const ReadingArgs<float>&, const AddressingFactors<float>&, int64_t B, Context&);
const char* read_factored(const ReadingArgs<float>&, const AddressingFactors<const float>&, int64_t B, Context&);
const char* read_factored_backward(const ReadingArgs<float>&, const AddressingFactors<const float>&,
                                   const ReadingGrads<float>&, int64_t B, Context&);
const char* kl_memory(const MatrixNormalArgs<float>&, int64_t B, Context&);
const char* logdet(const MatrixNormalArgs<float>&, int64_t B, Context&);
const char* kl_memory_backward(const MatrixNormalArgs<float>&, const MatrixNormalGrads<float>&, int64_t B, Context&);
const char* logdet_backward(const MatrixNormalArgs<float>&, const MatrixNormalGrads<float>&, int64_t B, Context&);

}  // namespace fastkm::cuda
