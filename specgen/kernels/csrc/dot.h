// Products of a row with as many columns as fill a vector; their inputs lie side by side:
// [inputs / INPUTS][columns][INPUTS].
#pragma once

#include <algorithm>

#include "simd.h"

namespace specgen {

// How an input of a row, or a few of them, times as many inputs of the columns are added to their sums. Rows are kept as
// `Row`: what takes part in many products is widened once. A word holds as many inputs of a row as are added at once.
template <class T>
struct Products {
  using Row = float;
  static constexpr int64_t INPUTS = 1;
  static words words_of(const T* row) { return (words)specgen::load(row); }
  static floats load(const T* columns) { return specgen::load(columns); }
  static floats add(floats sums, const float* x, floats columns) { return fma(all(*x), columns, sums); }
};

#ifdef __AVX512BF16__
template <>
struct Products<bfloat16> {
  using Row = bfloat16;
  static constexpr int64_t INPUTS = 2;
  static words words_of(const bfloat16* row) { return (words)_mm512_loadu_si512(row); }
  static __m512bh load(const bfloat16* columns) { return (__m512bh)_mm512_loadu_si512(columns); }
  static floats add(floats sums, const bfloat16* x, __m512bh columns) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(pair), columns);
  }
};
#endif

template <class T>
using Row = typename Products<T>::Row;

// The first `count` inputs of a row, or as many as fill a vector if that is more; zeros behind them.
template <class T>
inline words words_of_some(const T* row, int64_t count) {
  constexpr int64_t most = WIDTH * Products<T>::INPUTS;
  if (count >= most) return Products<T>::words_of(row);
  T padded[most] = {};
  std::copy_n(row, count, padded);
  return Products<T>::words_of(padded);
}

inline void as_row(const float* from, float* to, int64_t count) { std::copy_n(from, count, to); }
inline void as_row(const bfloat16* from, bfloat16* to, int64_t count) { std::memcpy(to, from, count * sizeof *to); }
inline void as_row(const bfloat16* from, float* to, int64_t count) {
  std::transform(from, from + count, to, [](bfloat16 x) { return widened(x); });
}

}  // namespace specgen
