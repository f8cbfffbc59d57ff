// Products of small matrices, one for each of a batch, as experts have them: the weights as they lie, columns side by
// side. Each number of the output is one sum in one order, whatever rows stand beside its own.
#include <algorithm>
#include <vector>

#include "products.h"
#include "tensors.h"
#include "vector.h"

namespace specgen {
namespace {

constexpr int64_t ROWS = 4;  // that read a weight together

// `count` columns of R rows; lines of weights and of the output are `columns` long.
template <class T, int R>
void strip(const float* x, const T* weight, T* out, int64_t inputs, int64_t columns, int64_t count) {
  floats sums[R] = {};
  for (int64_t k = 0; k < inputs; k++) {
    const T* at = weight + k * columns;
    const floats weights = load_some(at, count);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sums[r] = fma(all(x[r * inputs + k]), weights, sums[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) store_some(out + r * columns, sums[r], count);
}

template <class T>
void strips(const float* x, const T* weight, T* out, int64_t rows, int64_t inputs, int64_t columns, int64_t count) {
  in_parts(rows, ROWS, [&](int64_t r, int64_t size) {
    with_constant<ROWS>(size, [&](auto R) {
      strip<T, R>(x + r * inputs, weight, out + r * columns, inputs, columns, count);
    });
  });
}

template <class T>
void multiply_all(const Tensor& x, const Tensor& weight, Tensor& out) {
  const int64_t batch = x.size(0), rows = x.size(1), inputs = x.size(2), columns = weight.size(2);
  std::vector<float> lines(x.numel());
  as_row(data<T>(x), lines.data(), x.numel());
  const int64_t parts = parts_of(columns, WIDTH);
  in_parallel(batch * parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / parts, n = task % parts * WIDTH;
      strips(&lines[b * rows * inputs], data<T>(weight) + b * inputs * columns + n, data<T>(out) + b * rows * columns + n,
             rows, inputs, columns, std::min(WIDTH, columns - n));
    }
  });
}

}  // namespace

Tensor bmm(const Tensor& x, const Tensor& weight) {
  const Tensor rows = torch::stable::contiguous(x), weights = torch::stable::contiguous(weight);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1), weight.size(2)});
  if (x.scalar_type() == ScalarType::BFloat16)
    multiply_all<bfloat16>(rows, weights, out);
  else
    multiply_all<float>(rows, weights, out);
  return out;
}

}  // namespace specgen
