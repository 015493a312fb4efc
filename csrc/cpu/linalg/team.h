// Sharing the work inside a memory among the threads of a team.
#pragma once

#include "kernel_args.h"

namespace fastkm::FASTKM_LEVEL {

// A copy of fewer numbers is not shared: handing it out takes as long as copying thousands.
constexpr int64_t kLargeCopy = 1 << 17;

// The team that shares work of `steps`, or null if they are fewer than `least`.
inline const Team* team_for(int64_t steps, int64_t least = kLargeCopy) {
  return steps < least ? nullptr : current_team();
}

// Call f(begin, end) for disjoint parts that cover [0, count), on the threads of a team. A part that is shared does not
// share its own work.
template <class F>
[[gnu::noinline]] void share_among(const Team* team, int64_t count, const F& f) {
  current_team() = nullptr;
  team->share(
      count, [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      &f);
  current_team() = team;
}

// The same, or f(0, count) without a team. Small work pays for the question alone: f is compiled in line here, and no
// address of it leaves, so that what it captures by value stays in registers.
template <class F>
[[gnu::always_inline]] inline void share(const Team* team, int64_t count, const F& f) {
  if (team && count > 1) {
    const F shared = f;
    return share_among(team, count, shared);
  }
  f(int64_t{0}, count);
}

// Call part(each) on every thread of a team, where each(f) calls f(i) for the thread's share of [0, count). Here i = 0
// and i = count − 1 together are as much work as any other such pair, as the rows of a triangle are.
template <class F>
[[gnu::always_inline]] inline void share_triangle_parts(const Team* team, int64_t count, const F& part) {
  if (!team)
    return part([=](const auto& f) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) f(i);
    });
  share_among(team, (count + 1) / 2, [&](int64_t begin, int64_t end) {
    part([&](const auto& f) {
      for (int64_t i = begin; i < end; ++i) {
        f(i);
        if (count - 1 - i != i) f(count - 1 - i);
      }
    });
  });
}

// The same for work that the threads have nothing to say about.
template <class F>
[[gnu::always_inline]] inline void share_triangle(const Team* team, int64_t count, const F& f) {
  share_triangle_parts(team, count, [=](const auto& each) __attribute__((always_inline)) { each(f); });
}

}  // namespace fastkm::FASTKM_LEVEL
