// Every CPU kernel, built for x86-64 processors with AVX-512 (x86-64-v4).

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

#if FASTKM_LEVELS > 2
#if defined(__clang__)
#pragma clang diagnostic error "-Wignored-attributes"
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4")
#endif
#define FASTKM_LEVEL avx512
#define FASTKM_VECTOR_BYTES 64
#define FASTKM_TILE_ROWS 8
#include "cpu/levels/level.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
