// The kernels of one level. base.cpp, avx2.cpp, avx512.cpp and neon.cpp include it after they have set FASTKM_LEVEL,
// FASTKM_VECTOR_BYTES, FASTKM_TILE_ROWS and the target.
//
// With FASTKM_PROBE they hold one transpose and one tile, which compile in a second. So a build can ask whether a
// compiler makes the level; if not, it leaves the level out by FASTKM_LEVELS.
#if defined(FASTKM_PROBE)
#include "cpu/linalg/tile.h"

namespace fastkm::FASTKM_LEVEL {
template void transpose_square(float*, int64_t, const float*, int64_t);
template struct Tile<2, 1, float>;
}  // namespace fastkm::FASTKM_LEVEL

#else
#include "cpu/filtering/filter.h"
#include "cpu/filtering/filter_backward.h"
#include "cpu/matrix_normal/divergence.h"
#include "cpu/matrix_normal/divergence_backward.h"
#include "cpu/posterior/update.h"
#include "cpu/posterior/update_backward.h"
#include "cpu/posterior/update_into.h"
#include "cpu/reading/read.h"
#include "cpu/reading/read_backward.h"
#include "cpu/reading/read_factored.h"
#include "cpu/removal/remove.h"
#include "cpu/removal/remove_backward.h"
#include "cpu/removal/replace.h"
#include "cpu/square_root/update.h"
#include "cpu/square_root/update_backward.h"
#include "cpu/streaming/stream.h"
#include "cpu/writing/write.h"
#include "cpu/writing/write_backward.h"
#include "cpu/writing/write_gram.h"

namespace fastkm::FASTKM_LEVEL {

template <class Real>
const Kernels<Real>& kernels() {
  static constexpr Kernels<Real> table{
      .update_posterior = update_posterior<Real>,
      .write = write<Real>,
      .write_gram = write_gram<Real>,
      .update_posterior_backward = update_posterior_backward<Real>,
      .write_backward = write_backward<Real>,
      .remove_patterns = remove_patterns<Real>,
      .remove_patterns_backward = remove_patterns_backward<Real>,
      .replace_patterns = replace_patterns<Real>,
      .update_square_root = update_square_root<Real>,
      .update_square_root_backward = update_square_root_backward<Real>,
      .filter_posterior = filter_posterior<Real>,
      .filter_posterior_backward = filter_posterior_backward<Real>,
      .read = read<Real>,
      .factor_addressing = factor_addressing<Real>,
      .read_factored = read_factored<Real>,
      .kl_memory = kl_memory<Real>,
      .logdet = logdet<Real>,
      .read_backward = read_backward<Real>,
      .read_factored_backward = read_factored_backward<Real>,
      .kl_memory_backward = kl_memory_backward<Real>,
      .logdet_backward = logdet_backward<Real>,
      .update_posterior_into = update_posterior_into<Real>,
      .stream_patterns = stream_patterns<Real>,
      .refresh_streams = refresh_streams<Real>,
  };
  return table;
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();

}  // namespace fastkm::FASTKM_LEVEL
#endif  // FASTKM_PROBE
