// Included by each level_*.cpp after it has set FASTKM_LEVEL, FASTKM_VECTOR_BYTES, FASTKM_TILE_ROWS and the target.
#include "cpu/matrix_normal/divergence.h"
#include "cpu/matrix_normal/divergence_backward.h"
#include "cpu/posterior/update.h"
#include "cpu/posterior/update_backward.h"
#include "cpu/reading/read.h"
#include "cpu/reading/read_backward.h"
#include "cpu/writing/write.h"
#include "cpu/writing/write_backward.h"

namespace fastkm::FASTKM_LEVEL {

template <class T>
const Kernels<T>& kernels() {
  static constexpr Kernels<T> table{
      .update_posterior = update_posterior<T>,
      .write = write<T>,
      .update_posterior_backward = update_posterior_backward<T>,
      .write_backward = write_backward<T>,
      .read_memories = read_memories<T>,
      .factor_size = factor_size<T>,
      .factor_memories = factor_memories<T>,
      .read_tiles = read_tiles<T>,
      .kl_memory = kl_memory<T>,
      .logdet = logdet<T>,
      .read_backward = read_backward<T>,
      .kl_memory_backward = kl_memory_backward<T>,
      .logdet_backward = logdet_backward<T>,
  };
  return table;
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace fastkm::FASTKM_LEVEL
