// Every CPU kernel, built for any processor the compiler targets by default; neon.cpp is that of aarch64.

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

#if !defined(__aarch64__)
#define FASTKM_LEVEL base
#define FASTKM_VECTOR_BYTES 16
#define FASTKM_TILE_ROWS 4
#include "cpu/levels/level.h"
#endif
