// Low-rank additions to a layer's output, each adapter's on its own rows: shrink to a few numbers, then expand. The few
// numbers stay in float32, and each of them is one sum in one order, whatever rows stand beside its own.
#include <vector>

#include "tensors.h"
#include "simd.h"

namespace specgen {
namespace {

constexpr int64_t TOGETHER = 4;            // sums that wait for no other
constexpr int64_t WORTH_A_TASK = 1 << 16;  // products

// `count` of the rank's numbers, at most TOGETHER.
template <class T>
void shrink(const T* x, const T* down, int64_t inputs, int64_t count, float* shrunk) {
  floats sums[TOGETHER] = {};
  for (int64_t k = 0; k < inputs; k += WIDTH) {
    const floats numbers = load_some(x + k, inputs - k);
    for (int64_t j = 0; j < count; j++)
      sums[j] = fma(numbers, load_some(down + j * inputs + k, inputs - k), sums[j]);
  }
  for (int64_t j = 0; j < count; j++) shrunk[j] = sum(sums[j]);
}

template <class T>
void expand(const float* shrunk, const T* up, int64_t rank, int64_t outputs, T* y) {
  for (int64_t n = 0; n < outputs; n += WIDTH) {
    const int64_t rest = outputs - n;
    floats sums = {};
    for (int64_t j = 0; j < rank; j++) sums = fma(all(shrunk[j]), load_some(up + j * outputs + n, rest), sums);
    store_some(y + n, load_some(y + n, rest) + sums, rest);
  }
}

template <class T>
void add_rows(const T* x, T* y, const T* down, const T* up, int64_t rows, int64_t rank, int64_t inputs,
              int64_t outputs) {
  std::vector<float> shrunk(rank);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t j = 0; j < rank; j += TOGETHER)
      shrink(x + r * inputs, down + j * inputs, inputs, std::min(TOGETHER, rank - j), &shrunk[j]);
    expand(shrunk.data(), up, rank, outputs, y + r * outputs);
  }
}

template <class T>
void add_all(Tensor& y, const Tensor& x, const std::vector<int64_t>& bounds, const std::vector<Tensor>& downs,
             const std::vector<Tensor>& ups) {
  const int64_t inputs = x.size(1), outputs = y.size(1);
  for (size_t i = 0; i < downs.size(); i++) {
    const int64_t first = bounds[2 * i], rows = bounds[2 * i + 1] - first, rank = downs[i].size(0);
    auto work = [&](int64_t begin, int64_t end) {
      add_rows(data<T>(x) + (first + begin) * inputs, data<T>(y) + (first + begin) * outputs, data<T>(downs[i]),
               data<T>(ups[i]), end - begin, rank, inputs, outputs);
    };
    if (rows * rank * (inputs + outputs) < WORTH_A_TASK)
      work(0, rows);
    else
      in_parallel(rows, work);
  }
}

}  // namespace

void segmented_lora(Tensor y, const Tensor& x, std::vector<int64_t> bounds, std::vector<Tensor> downs,
                    std::vector<Tensor> ups) {
  STD_TORCH_CHECK(y.is_contiguous() && x.is_contiguous(), "rows must lie side by side");
  if (y.scalar_type() == ScalarType::BFloat16)
    add_all<bfloat16>(y, x, bounds, downs, ups);
  else
    add_all<float>(y, x, bounds, downs, ups);
}

}  // namespace specgen
