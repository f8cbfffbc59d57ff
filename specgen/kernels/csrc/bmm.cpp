// Products of small matrices, one for each of a batch, as experts have them: the weights as they lie, columns side by
// side, or the inputs of each column. Each number of the output is one sum in one order, whatever rows stand beside its
// own.
#include <algorithm>
#include <vector>

#include "dot.h"
#include "tensors.h"
#include "simd.h"

namespace specgen {
namespace {

constexpr int64_t ROWS = 4;  // that read a weight together

// `count` columns of R rows; lines of weights are `pitch` long, of the output `columns`.
template <class W, class T, int R>
void strip(const float* x, const W* weight, int64_t pitch, T* out, int64_t inputs, int64_t columns, int64_t count) {
  floats sums[R] = {};
  for (int64_t k = 0; k < inputs; k++) {
    const floats weights = load_some(weight + k * pitch, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sums[r] = fma(all(x[r * inputs + k]), weights, sums[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) store_some(out + r * columns, sums[r], count);
}

template <class W, class T>
void strips(const float* x, const W* weight, int64_t pitch, T* out, int64_t rows, int64_t inputs, int64_t columns,
            int64_t count) {
  in_parts(rows, ROWS, [&](int64_t r, int64_t size) {
    with_constant<ROWS>(size, [&](auto R) {
      strip<W, T, R>(x + r * inputs, weight, pitch, out + r * columns, inputs, columns, count);
    });
  });
}

// `count` columns whose inputs lie side by side, as lines of WIDTH columns.
template <class T>
void turn(const T* weight, float* lines, int64_t inputs, int64_t count) {
  for (int64_t k = 0; k < inputs; k += WIDTH) {
    words square[WIDTH] = {};
    for (int64_t c = 0; c < count; c++) square[c] = (words)load_some(weight + c * inputs + k, inputs - k);
    transpose(square);
    for (int64_t i = 0; i < std::min(WIDTH, inputs - k); i++) store(lines + (k + i) * WIDTH, (floats)square[i]);
  }
}

// side_by_side: the inputs of each column, in place of the columns.
template <class T>
void multiply_all(const Tensor& x, const Tensor& weight, Tensor& out, bool side_by_side) {
  const int64_t batch = x.size(0), rows = x.size(1), inputs = x.size(2), columns = out.size(2);
  std::vector<float> lines(x.numel());
  as_row(data<T>(x), lines.data(), x.numel());
  const int64_t parts = parts_of(columns, WIDTH);
  in_parallel(batch * parts, [&](int64_t begin, int64_t end) {
    std::vector<float> turned(side_by_side ? inputs * WIDTH : 0);
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / parts, n = task % parts * WIDTH, count = std::min(WIDTH, columns - n);
      const float* const own = &lines[b * rows * inputs];
      const T* const all_columns = data<T>(weight) + b * inputs * columns;
      T* const to = data<T>(out) + b * rows * columns + n;
      if (!side_by_side) {
        strips(own, all_columns + n, columns, to, rows, inputs, columns, count);
        continue;
      }
      turn(all_columns + n * inputs, turned.data(), inputs, count);
      strips(own, turned.data(), WIDTH, to, rows, inputs, columns, count);
    }
  });
}

}  // namespace

Tensor bmm(const Tensor& x, const Tensor& weight) {
  const Tensor rows = torch::stable::contiguous(x), lines = torch::stable::transpose(weight, 1, 2);
  const bool side_by_side = !weight.is_contiguous() && lines.is_contiguous();
  const Tensor weights = side_by_side ? lines : torch::stable::contiguous(weight);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), weight.size(2)});
  if (x.scalar_type() == ScalarType::BFloat16)
    multiply_all<bfloat16>(rows, weights, out, side_by_side);
  else
    multiply_all<float>(rows, weights, out, side_by_side);
  return out;
}

}  // namespace specgen
