// Chooses the level that the kernels run at, once, by what the processor can do.
#include <algorithm>
#include <atomic>

#include "kernel_args.h"

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

template <class Real>
const Kernels<Real>& kernels() {
#if defined(__x86_64__)
  switch (level().load(std::memory_order_relaxed)) {
    case kAvx512: return avx512::kernels<Real>();
    case kAvx2: return avx2::kernels<Real>();
    case kBase: break;
  }
#endif
  return base::kernels<Real>();
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace fastkm
