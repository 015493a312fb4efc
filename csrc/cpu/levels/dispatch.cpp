// Chooses the level that the kernels run at, once, by what the processor can do, and says what was compiled.
#include <algorithm>
#include <atomic>
#include <iterator>

#include "kernel_args.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define FASTKM_TEXT(macro) FASTKM_TEXT_OF(macro)
#define FASTKM_TEXT_OF(value) #value

namespace fastkm {

namespace {

#if defined(__aarch64__)
namespace lowest = neon;
constexpr const char* kLowestName = "NEON";
#else
namespace lowest = base;
constexpr const char* kLowestName = "base";
#endif

constexpr const char* kNames[] = {
    kLowestName,
#if FASTKM_LEVELS > 1
    "AVX2",
#endif
#if FASTKM_LEVELS > 2
    "AVX-512",
#endif
};

#if FASTKM_LEVELS > 1
// The instructions of x86-64-v3 that are not vector instructions of 256 bits; clang 14 has no name for them.
bool has_scalar_instructions() {
  constexpr unsigned kMovbe = 1 << 22, kF16c = 1 << 29, kLzcnt = 1 << 5;
  unsigned a, b, basic = 0, extended = 0, d;
  return __get_cpuid(1, &a, &b, &basic, &d) && __get_cpuid(0x80000001, &a, &b, &extended, &d) && basic & kMovbe &&
         basic & kF16c && extended & kLzcnt;
}

// Features are asked for one by one: GCC 11 and clang have no "x86-64-v3" here.
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && has_scalar_instructions();
}

[[maybe_unused]] bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

Level highest_level() {
#if FASTKM_LEVELS > 1
  __builtin_cpu_init();
#endif
#if FASTKM_LEVELS > 2
  if (runs_avx512()) return kAvx512;
#endif
#if FASTKM_LEVELS > 1
  if (runs_avx2()) return kAvx2;
#endif
  return kLowest;
}

std::atomic<Level>& level() {
  static std::atomic<Level> chosen{highest_level()};
  return chosen;
}

}  // namespace

Level select_level(int64_t limit) {
  const int64_t chosen = std::clamp<int64_t>(limit, kLowest, highest_level());
  level() = static_cast<Level>(chosen);
  return level();
}

template <class Real>
const Kernels<Real>& kernels() {
  switch (level().load(std::memory_order_relaxed)) {
#if FASTKM_LEVELS > 2
    case kAvx512: return avx512::kernels<Real>();
#endif
#if FASTKM_LEVELS > 1
    case kAvx2: return avx2::kernels<Real>();
#endif
    default: return lowest::kernels<Real>();
  }
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

const char* level_name(int64_t i) { return i >= 0 && i < std::ssize(kNames) ? kNames[i] : nullptr; }

const char* compiler() {
#if defined(__clang__)
  return "clang++ " FASTKM_TEXT(__clang_major__) "." FASTKM_TEXT(__clang_minor__) "." FASTKM_TEXT(__clang_patchlevel__);
#else
  return "g++ " __VERSION__;
#endif
}

}  // namespace fastkm
