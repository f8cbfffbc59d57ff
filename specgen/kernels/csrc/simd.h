// As many floats at once as fill a register, in the compiler's own vectors: sixteen with AVX-512, else eight.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace specgen {

#ifdef __AVX512F__
constexpr int64_t WIDTH = 16, REGISTERS = 32;
#else
constexpr int64_t WIDTH = 8, REGISTERS = 16;
#endif
typedef float floats __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t ints __attribute__((vector_size(WIDTH * sizeof(int32_t))));
typedef uint32_t words __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
typedef uint16_t halves __attribute__((vector_size(WIDTH * sizeof(uint16_t))));

struct bfloat16 {
  uint16_t bits;
};

inline float widened(float x) { return x; }

inline float widened(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline floats all(float x) { return x - floats{}; }

inline floats load(const float* from) {
  floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// bfloat16 as they are, each in the lower half of its word.
inline words load_bits(const bfloat16* from) {
  halves x;
  std::memcpy(&x, from, sizeof x);
  // GCC 12 makes several of a conversion in its own words.
#ifdef __AVX512F__
  return (words)_mm512_cvtepu16_epi32((__m256i)x);
#else
  return (words)_mm256_cvtepu16_epi32((__m128i)x);
#endif
}

inline floats load(const bfloat16* from) { return (floats)(load_bits(from) << 16); }

inline void store(float* to, floats x) { std::memcpy(to, &x, sizeof x); }

// To the nearest, ties to even, as torch rounds.
inline void store(bfloat16* to, floats x) {
  words bits = (words)x;
  words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  halves kept = __builtin_convertvector(x == x ? rounded : words{} + 0x7FC0, halves);
  std::memcpy(to, &kept, sizeof kept);
}

// The first `count` of a vector, or all if that is more; zeros behind them.
template <class T>
inline floats load_some(const T* from, int64_t count) {
  if (count >= WIDTH) return load(from);
  T padded[WIDTH] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_some(T* to, floats x, int64_t count) {
  if (count >= WIDTH) return store(to, x);
  T padded[WIDTH];
  store(padded, x);
  std::memcpy(to, padded, count * sizeof(T));
}

// a * b + c, rounded once. Compilers are told to make none of these themselves: they choose by what stands around.
inline floats fma(floats a, floats b, floats c) {
#ifdef __AVX512F__
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// 0, 1, 2 and so on.
inline words numbered() {
  words lanes;
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; i++) lanes[i] = i;
  return lanes;
}

// Rows of a square become its columns.
inline void transpose(words (&x)[WIDTH]) {
  const words lanes = numbered();
  // Of each two blocks that lie across the diagonal, in squares of half the size each time.
#pragma GCC unroll 4
  for (int half = WIDTH / 2; half; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
      if (i & half) continue;
      const words upper = (lanes & half) ? lanes - half + WIDTH : lanes;
      const words lower = (lanes & half) ? lanes + WIDTH : lanes + half;
      const words above = __builtin_shuffle(x[i], x[i + half], upper);
      x[i + half] = __builtin_shuffle(x[i], x[i + half], lower);
      x[i] = above;
    }
}

// Always in this order: a sum must not depend on who asks for it.
inline float sum(floats x) {
#pragma GCC unroll 4
  for (int half = WIDTH / 2; half; half /= 2) x += __builtin_shuffle(x, numbered() ^ half);
  return x[0];
}

inline float largest(floats x) {
#pragma GCC unroll 4
  for (int half = WIDTH / 2; half; half /= 2) {
    const floats other = __builtin_shuffle(x, numbered() ^ half);
    x = x > other ? x : other;
  }
  return x[0];
}

// Whether any of them is above y.
inline bool any_above(floats x, float y) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(y), _CMP_GT_OQ);
#else
  return _mm256_movemask_ps((__m256)(x > y));
#endif
}

// e^x for x <= 0, within 2 units in the last place; 0 for what is too small for a normal float. Cephes' expf.
inline floats exp(floats x) {
  ints vanishes = x < -87.3f;
  x = vanishes ? floats{} : x;
  ints n = __builtin_convertvector(fma(x, all(1.44269504f), all(-0.5f)), ints);
  floats whole = __builtin_convertvector(n, floats);
  floats r = fma(whole, all(-0.693359375f), x);
  r = fma(whole, all(2.12194440e-4f), r);
  floats y = all(1.9875691500e-4f);
  y = fma(y, r, all(1.3981999507e-3f));
  y = fma(y, r, all(8.3334519073e-3f));
  y = fma(y, r, all(4.1665795894e-2f));
  y = fma(y, r, all(1.6666665459e-1f));
  y = fma(y, r, all(5.0000001201e-1f));
  y = fma(y, r * r, r) + 1.0f;
  return vanishes ? floats{} : y * (floats)((n + 127) << 23);
}

}  // namespace specgen
