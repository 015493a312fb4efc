// Every CPU kernel, built for aarch64 processors, all of which have the vectors of NEON.

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

#if defined(__aarch64__)
// GCC would load the eight factors of a tile's column before it multiplies. With them a tile needs 35 of 32 registers.
#if !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")
#endif
#define FASTKM_LEVEL neon
#define FASTKM_VECTOR_BYTES 16
#define FASTKM_TILE_ROWS 8
#include "cpu/levels/level.h"
#endif
