// Passes over the rows of a matrix that threads share.
//
// A pass goes through the rows in units of kUnitRows. The threads of a team share the units always in the same way, so
// a thread finds in its own cache the rows that it had in the pass before. A sum over rows is added up unit by unit in
// their order, whoever computed them: results do not depend on the number of threads.
#pragma once

#include "cpu/linalg/matrix.h"
#include "cpu/linalg/team.h"

namespace fastkm::FASTKM_LEVEL {

constexpr int64_t kUnitRows = 64;

inline int64_t count_units(int64_t rows) { return (rows + kUnitRows - 1) / kUnitRows; }

// Call f(begin, end) for the rows of every unit.
template <class F>
void each_unit(const Team* team, int64_t rows, const F& f) {
  share(team, count_units(rows), [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) f(unit * kUnitRows, smaller((unit + 1) * kUnitRows, rows));
  });
}

}  // namespace fastkm::FASTKM_LEVEL
