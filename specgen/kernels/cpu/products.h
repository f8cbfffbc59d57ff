// Products of a row with sixteen columns, whose inputs lie side by side: [inputs / INPUTS][16 columns][INPUTS].
#pragma once

#include "vector.h"

namespace specgen {

// How an input of a row, or a few of them, times as many inputs of sixteen columns are added to sixteen sums.
template <class T>
struct Products {
  static constexpr int64_t INPUTS = 1;
  static floats load(const T* columns) { return specgen::load(columns); }
  static floats add(floats sums, const T* x, floats columns) { return sums + widened(*x) * columns; }
};

#ifdef __AVX512BF16__
template <>
struct Products<bfloat16> {
  static constexpr int64_t INPUTS = 2;
  static __m512bh load(const bfloat16* columns) { return (__m512bh)_mm512_loadu_si512(columns); }
  static floats add(floats sums, const bfloat16* x, __m512bh columns) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(pair), columns);
  }
};
#endif

}  // namespace specgen
