// Small memories, one in each lane of the vector registers.
//
// A memory with few rows leaves most of a vector register empty, and a call of a kernel costs more than its arithmetic.
// So kLanes memories are computed together: a vector holds one number of each. Every lane computes what it would alone,
// so a result does not depend on the other memories of the group.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/linalg/matrix.h"
#include "cpu/linalg/transpose.h"
#include "cpu/linalg/variance_divergence.h"

namespace fastkm::FASTKM_LEVEL {

// The largest memory that is computed in a lane. With more rows a memory fills vector registers alone, and with more
// numbers a group does not fit the cache. A group of one memory takes as long as a full one: with more steps of a
// vector register it would take longer than the call around it.
constexpr int64_t kLaneRows = 16, kLaneNumbers = 512, kLaneSteps = 1 << 16;

// Whether memories of a shape are computed in lanes, where a group takes `steps`. The batch does not enter, because it
// must not change a result.
template <class Real>
bool fits_lanes(int64_t K, int64_t C, int64_t steps) {
  return K <= kLaneRows && K * (K + C) <= kLaneNumbers && steps <= kLaneSteps;
}

// Memories [first, first + count) of a batch, at most one for each lane. The other lanes hold zeros.
struct Group {
  int64_t first, count;
};

// Call f(group) for groups that cover memories [begin, end).
template <class Real, class F>
void each_group(int64_t begin, int64_t end, const F& f) {
  for (int64_t first = begin; first < end; first += kLanes<Real>) f(Group{first, smaller(kLanes<Real>, end - first)});
}

// A matrix of each memory of a group: entry (i, j) is a vector. Vectors of a group are matrices of one row.
template <class Real>
struct LaneMatrix {
  Real* data;
  int64_t rows, columns;

  Real* at(int64_t i, int64_t j = 0) const { return data + (i * columns + j) * kLanes<Real>; }
  Vec<Real> get(int64_t i, int64_t j) const { return load(at(i, j)); }
  void set(int64_t i, int64_t j, Vec<Real> value) const { store<Real>(at(i, j), value); }
  Vec<Real> get(int64_t j) const { return get(0, j); }
  void set(int64_t j, Vec<Real> value) const { set(0, j, value); }
  LaneMatrix row(int64_t i) const { return {at(i), 1, columns}; }
};

template <class Real>
LaneMatrix<Real> allocate_lanes(Arena& arena, int64_t rows, int64_t columns) {
  return {arena.allocate<Real>(rows * columns * kLanes<Real>), rows, columns};
}

template <class Real>
inline Vec<Real> broadcast(Real value) {
  return Vec<Real>{} + value;
}

// Bits of the numbers in a vector that a comparison of vectors selects.
template <class Real>
using LaneMask = decltype(lane_numbers<Real>());

// Call f(i, j, count) for runs of entries that are contiguous in the caller's memory.
template <class Real, class F>
void each_run(const Batch<Real>& batch, int64_t rows, int64_t columns, const F& f) {
  const bool contiguous_rows = columns == 1 || batch.stride[2] == 1;
  if (contiguous_rows && (rows == 1 || batch.stride[1] == columns)) return f(0, 0, rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    if (contiguous_rows)
      f(i, 0, columns);
    else
      for (int64_t j = 0; j < columns; ++j) f(i, j, 1);
  }
}

// Copy matrices of a group in. A lane without a memory is zero.
template <class Real>
void load_lanes(const LaneMatrix<Real>& to, const Batch<const Real>& from, const Group& group) {
  constexpr int64_t W = kLanes<Real>;
  if (group.count < W) __builtin_memset(to.data, 0, static_cast<size_t>(to.rows * to.columns * W) * sizeof(Real));
  each_run(from, to.rows, to.columns, [&](int64_t i, int64_t j, int64_t count) {
    const Real* source = from.at(group.first, i, j);
    Real* target = to.at(i, j);
    if (group.count < W || count < W) {
      for (int64_t lane = 0; lane < group.count; ++lane)
        for (int64_t n = 0; n < count; ++n) target[n * W + lane] = source[lane * from.stride[0] + n];
      return;
    }
    for (int64_t next = 0; next < count; next += W) {  // the last square may overlap the one before it
      const int64_t n = smaller(next, count - W);
      transpose_square(target + n * W, W, source + n, from.stride[0]);
    }
  });
}

// Copy results to the caller's memory.
template <class Real>
void store_lanes(const Batch<Real>& to, const LaneMatrix<Real>& from, const Group& group) {
  constexpr int64_t W = kLanes<Real>;
  each_run(to, from.rows, from.columns, [&](int64_t i, int64_t j, int64_t count) {
    const Real* source = from.at(i, j);
    Real* target = to.at(group.first, i, j);
    if (group.count < W || count < W) {
      for (int64_t lane = 0; lane < group.count; ++lane)
        for (int64_t n = 0; n < count; ++n) target[lane * to.stride[0] + n] = source[n * W + lane];
      return;
    }
    for (int64_t next = 0; next < count; next += W) {
      const int64_t n = smaller(next, count - W);
      transpose_square(target + n, to.stride[0], source + n * W, W);
    }
  });
}

template <class Real>
Vec<Real> lane_dot(int64_t n, const Real* x, const Real* y) {
  constexpr int64_t W = kLanes<Real>;
  Vec<Real> sum[2] = {};
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    sum[0] += load(x + i * W) * load(y + i * W);
    sum[1] += load(x + (i + 1) * W) * load(y + (i + 1) * W);
  }
  if (i < n) sum[0] += load(x + i * W) * load(y + i * W);
  return sum[0] + sum[1];
}

// y = M x
template <class Real>
void lane_product(const LaneMatrix<Real>& y, const LaneMatrix<Real>& m, const LaneMatrix<Real>& x) {
  constexpr int64_t kRows = 4;
  int64_t i = 0;
  for (; i + kRows <= m.rows; i += kRows) {
    Vec<Real> sum[kRows] = {};
    for (int64_t j = 0; j < m.columns; ++j)
      for (int64_t r = 0; r < kRows; ++r) sum[r] += m.get(i + r, j) * x.get(j);
    for (int64_t r = 0; r < kRows; ++r) y.set(i + r, sum[r]);
  }
  for (; i < m.rows; ++i) y.set(i, lane_dot(m.columns, m.at(i), x.data));
}

// Call f(j, (Mᵀ x)_j) for every column.
template <class Real, class F>
[[gnu::always_inline]] inline void each_transposed(const LaneMatrix<Real>& m, const LaneMatrix<Real>& x, const F& f) {
  constexpr int64_t kColumns = 4;
  const auto compute = [&](int64_t j, auto count) __attribute__((always_inline)) {
    constexpr int64_t N = count;
    Vec<Real> sum[N] = {};
    for (int64_t i = 0; i < m.rows; ++i)
      for (int64_t n = 0; n < N; ++n) sum[n] += m.get(i, j + n) * x.get(i);
    for (int64_t n = 0; n < N; ++n) f(j + n, sum[n]);
  };
  int64_t j = 0;
  for (; j + kColumns <= m.columns; j += kColumns) compute(j, std::integral_constant<int64_t, kColumns>());
  for (; j < m.columns; ++j) compute(j, std::integral_constant<int64_t, 1>());
}

// y = Mᵀ x
template <class Real>
void lane_product_transposed(const LaneMatrix<Real>& y, const LaneMatrix<Real>& m, const LaneMatrix<Real>& x) {
  each_transposed(m, x, [&](int64_t j, Vec<Real> sum) __attribute__((always_inline)) { y.set(j, sum); });
}

// y = d − Mᵀ x
template <class Real>
void lane_residual(const LaneMatrix<Real>& y, const LaneMatrix<Real>& d, const LaneMatrix<Real>& m,
                   const LaneMatrix<Real>& x) {
  each_transposed(m, x, [&](int64_t j, Vec<Real> sum) __attribute__((always_inline)) { y.set(j, d.get(j) - sum); });
}

// y ← y − c x
template <class Real>
void lane_subtract(const LaneMatrix<Real>& y, Vec<Real> c, const LaneMatrix<Real>& x) {
  for (int64_t i = 0; i < y.columns; ++i) y.set(i, y.get(i) - c * x.get(i));
}

// The lower triangle of M Mᵀ, mirrored.
template <class Real>
void lane_gram(const LaneMatrix<Real>& gram, const LaneMatrix<Real>& m) {
  const auto set = [&](int64_t i, int64_t j, Vec<Real> sum) __attribute__((always_inline)) {
    gram.set(i, j, sum);
    gram.set(j, i, sum);
  };
  for (int64_t i = 0; i < m.rows; ++i) {
    int64_t j = 0;
    for (; j + 4 <= i + 1; j += 4) {
      Vec<Real> sum[4] = {};
      for (int64_t c = 0; c < m.columns; ++c)
        for (int64_t n = 0; n < 4; ++n) sum[n] += m.get(i, c) * m.get(j + n, c);
      for (int64_t n = 0; n < 4; ++n) set(i, j + n, sum[n]);
    }
    for (; j <= i; ++j) set(i, j, lane_dot(m.columns, m.at(i), m.at(j)));
  }
}

// Factor the lower triangle of A = L D Lᵀ in place, with ones on the diagonal of L: this takes no square roots. L is
// left below the diagonal, 1/D on it, and D in `pivots`. Returns the lanes whose matrix is positive definite; in the
// others a pivot of one stands for each that is not positive.
template <class Real>
LaneMask<Real> lane_factor(const LaneMatrix<Real>& a, const LaneMatrix<Real>& pivots) {
  LaneMask<Real> good = ~LaneMask<Real>{};
  for (int64_t j = 0; j < a.rows; ++j) {
    // Rows from j on hold P = L D in the columns before j.
    Vec<Real> pivot = a.get(j, j);
    for (int64_t k = 0; k < j; ++k) {
      const Vec<Real> scaled = a.get(j, k), entry = scaled * a.get(k, k);
      pivot -= scaled * entry;
      a.set(j, k, entry);
    }
    const LaneMask<Real> positive = (pivot > 0) & (pivot <= std::numeric_limits<Real>::max());
    good &= positive;
    pivot = positive ? pivot : broadcast<Real>(1);
    pivots.set(j, pivot);
    a.set(j, j, 1 / pivot);
    for (int64_t i = j + 1; i < a.rows; ++i) a.set(i, j, a.get(i, j) - lane_dot(j, a.at(i), a.at(j)));
  }
  return good;
}

// x ← (L D Lᵀ)⁻¹ x
template <class Real>
void lane_solve(const LaneMatrix<Real>& lower, const LaneMatrix<Real>& x) {
  for (int64_t i = 1; i < lower.rows; ++i) x.set(i, x.get(i) - lane_dot(i, lower.at(i), x.data));
  for (int64_t i = 0; i < lower.rows; ++i) x.set(i, x.get(i) * lower.get(i, i));
  for (int64_t i = lower.rows - 1; i > 0; --i) {
    const Vec<Real> solved = x.get(i);
    for (int64_t j = 0; j < i; ++j) x.set(j, x.get(j) - lower.get(i, j) * solved);
  }
}

template <class Real>
Vec<Real> lane_log(Vec<Real> x) {
  for (int64_t lane = 0; lane < kLanes<Real>; ++lane) x[lane] = std::log(x[lane]);
  return x;
}

template <class Real>
Vec<Real> lane_variance_divergence(Vec<Real> ratio, Vec<Real> excess) {
  Vec<Real> divergence = divergence_series<Real>(ratio, excess);
  for (int64_t lane = 0; lane < kLanes<Real>; ++lane)
    if (!is_near_one(ratio[lane])) divergence[lane] = excess[lane] - std::log(ratio[lane]);
  return divergence;
}

// The lanes whose covariance is symmetric up to rounding, and those whose entries are finite.
template <class Real>
struct LaneSymmetry {
  LaneMask<Real> symmetric, finite;
};

template <class Real>
LaneSymmetry<Real> lane_symmetry(const LaneMatrix<Real>& m) {
  LaneMask<Real> scale = {}, gap = {};
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const auto size = magnitude<Real>(m.get(i, j)), difference = magnitude<Real>(m.get(i, j) - m.get(j, i));
      scale = size > scale ? size : scale;
      gap = difference > gap ? difference : gap;
    }
  const Vec<Real> largest = reinterpret_cast<Vec<Real>>(gap), entry = reinterpret_cast<Vec<Real>>(scale);
  return {largest <= std::sqrt(std::numeric_limits<Real>::epsilon()) * entry, largest - largest == 0};
}

// What is wrong in each lane.
template <class Real>
struct LaneStatus {
  LaneMask<Real> code = {};  // of Status

  // Note a status where `good` is false, unless another one came before.
  void expect(LaneMask<Real> good, Status status) {
    const LaneMask<Real> otherwise = LaneMask<Real>{} + static_cast<LaneNumber<Real>>(status);
    code = (code == 0) & ~good ? otherwise : code;
  }
  void expect_covariance(const LaneSymmetry<Real>& found) {
    expect(found.finite, kNotPositiveDefinite);
    expect(found.symmetric, kAsymmetric);
  }
  void take_larger(const LaneStatus& other) { code = code > other.code ? code : other.code; }
  void store(int32_t* info, const Group& group) const {
    for (int64_t lane = 0; lane < group.count; ++lane) info[group.first + lane] = static_cast<int32_t>(code[lane]);
  }
};

}  // namespace fastkm::FASTKM_LEVEL
