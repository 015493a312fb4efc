// What this build holds: the instruction set that the CPU kernels run with, and the GPU architectures it was compiled
// for.
#include <torch/csrc/stable/library.h>

#include <iterator>

#include "kernel_args.h"

namespace fastkm {

static int64_t select_cpu_level(int64_t limit) { return select_level(limit); }

// The i-th architecture the CUDA kernels are compiled for, 0 past the last.
static int64_t cuda_architecture(int64_t i) {
#ifdef FASTKM_WITH_CUDA
  constexpr int64_t kArchitectures[] = {FASTKM_CUDA_ARCHITECTURES};
#else
  constexpr int64_t kArchitectures[] = {0};
#endif
  return i >= 0 && i < std::ssize(kArchitectures) ? kArchitectures[i] : 0;
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CompositeExplicitAutograd, m) {
  m.impl("select_cpu_level", TORCH_BOX(&select_cpu_level));
  m.impl("cuda_architecture", TORCH_BOX(&cuda_architecture));
}

}  // namespace fastkm
