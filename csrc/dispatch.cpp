// Which build of the kernels runs: decided once, from what the processor can do.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <iterator>

#include "kernels.h"

namespace fastkm {

namespace {

Level highest_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return kAvx2;
#endif
  return kBase;
}

std::atomic<Level>& level() {
  static std::atomic<Level> chosen{highest_level()};
  return chosen;
}

}  // namespace

Level select_level(int64_t limit) {
  const int64_t chosen = std::clamp<int64_t>(limit, kBase, highest_level());
  level() = static_cast<Level>(chosen);
  return level();
}

template <class T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  switch (level().load(std::memory_order_relaxed)) {
    case kAvx512: return avx512::kernels<T>();
    case kAvx2: return avx2::kernels<T>();
    case kBase: break;
  }
#endif
  return base::kernels<T>();
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

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
