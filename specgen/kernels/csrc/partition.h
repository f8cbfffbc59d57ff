// How work is cut.
#pragma once

#include <cstdint>
#include <type_traits>

namespace specgen {

// How many parts of `most` or fewer there are in `count`.
inline int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }

inline int64_t rounded_up(int64_t n, int64_t step) { return parts_of(n, step) * step; }

// Those parts, of one size or two: work(begin, size).
template <class F>
void in_parts(int64_t count, int64_t most, const F& work) {
  const int64_t parts = parts_of(count, most);
  for (int64_t part = 0; part < parts; part++) {
    const int64_t begin = count * part / parts;
    work(begin, count * (part + 1) / parts - begin);
  }
}

// work(n) with an `n`, 1 to MOST, that the compiler knows: sums that a variable chooses would lie in memory.
template <int MOST, class F>
void with_constant(int64_t n, const F& work) {
  if (n == MOST) return work(std::integral_constant<int, MOST>{});
  if constexpr (MOST > 1) with_constant<MOST - 1>(n, work);
}

}  // namespace specgen
