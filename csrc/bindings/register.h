// Registers the operators of a family for every place that this build has kernels for.
//
// A binding writes FASTKM_REGISTER(f) for its function template `f<Place>(library)`, and names the CUDA launcher of an
// operation by FASTKM_LAUNCHER(name). A build without CUDA includes no header of cuda/, and its launchers are null.
#pragma once

#include <torch/csrc/stable/library.h>

#include "bindings/cpu_place.h"

#if defined(FASTKM_WITH_CUDA) || defined(FASTKM_SIMT)
#include "bindings/gpu_place.h"
#define FASTKM_LAUNCHER(name) [](auto&... arguments) { return cuda::name(arguments...); }
#else
#define FASTKM_LAUNCHER(name) nullptr
#endif

#if defined(FASTKM_SIMT)
#define FASTKM_REGISTER(register_operators) \
  STABLE_TORCH_LIBRARY_IMPL(fastkm_simt, CPU, m) { register_operators<Gpu>(m); }
#elif defined(FASTKM_WITH_CUDA)
#define FASTKM_REGISTER(register_operators)                                 \
  STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) { register_operators<Cpu>(m); } \
  STABLE_TORCH_LIBRARY_IMPL(fastkm, CUDA, m) { register_operators<Gpu>(m); }
#else
#define FASTKM_REGISTER(register_operators) \
  STABLE_TORCH_LIBRARY_IMPL(fastkm, CPU, m) { register_operators<Cpu>(m); }
#endif
