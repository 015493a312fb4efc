// Every CPU kernel, built for x86-64 processors with AVX2 and FMA (x86-64-v3).

// The standard library comes before the target is set. Its inline functions are shared by all levels, so none may be
// compiled for this one.
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/linalg/arena.h"
#include "kernel_args.h"

#if FASTKM_LEVELS > 1
#if defined(__clang__)
#pragma clang diagnostic error "-Wignored-attributes"
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#define FASTKM_LEVEL avx2
#define FASTKM_VECTOR_BYTES 32
#define FASTKM_TILE_ROWS 4
#include "cpu/levels/level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
