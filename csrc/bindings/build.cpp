// What this build holds: the instruction levels of the CPU kernels, the GPU architectures that the CUDA kernels were
// compiled for, the operators as they were when it was built, and how it was built.
#include <torch/csrc/stable/library.h>

#include <iterator>
#include <string>

#include "fastkm_build.h"
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

static std::string built_schemas() { return FASTKM_SCHEMAS; }

// One fact a line: a name, a colon, a value.
static std::string build_facts() {
  std::string levels = level_name(0);
  for (int64_t i = 1; level_name(i); ++i) levels += std::string(", ") + level_name(i);
  constexpr uint64_t kTarget = TORCH_TARGET_VERSION;
  const std::string oldest = std::to_string(kTarget >> 56) + "." + std::to_string(kTarget >> 48 & 0xFF);
  return std::string("compiler: ") + compiler() + "\ninstruction levels: " + levels + "\ntorch: " FASTKM_TORCH +
         ", runs from " + oldest + "\nCUDA: " FASTKM_CUDA_RELEASE "\nflags left out: " FASTKM_FLAGS_LEFT_OUT;
}

STABLE_TORCH_LIBRARY_IMPL(fastkm, CompositeExplicitAutograd, m) {
  m.impl("select_cpu_level", TORCH_BOX(&select_cpu_level));
  m.impl("cuda_architecture", TORCH_BOX(&cuda_architecture));
  m.impl("built_schemas", TORCH_BOX(&built_schemas));
  m.impl("build_facts", TORCH_BOX(&build_facts));
}

}  // namespace fastkm
