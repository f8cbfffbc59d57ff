// The largest numbers of each row of logits, in one pass: what is no larger than the last of them is skipped, some vectors
// at a time, and that is nearly everything.
#include <algorithm>
#include <tuple>
#include <vector>

#include "tensors.h"
#include "simd.h"

namespace specgen {
namespace {

constexpr int64_t TASKS = 8;
constexpr int64_t LEAST = 4096;  // a part smaller than this is not worth a task

// A list in descending order; of equals the one that came first stands first.
struct Top {
  float* values;
  int64_t* ids;
  int64_t count;
  int64_t filled = 0;

  float last() const { return values[count - 1]; }

  void offer(float value, int64_t id) {
    if (filled == count && !(value > last())) return;
    int64_t place = filled < count ? filled++ : count - 1;
    for (; place && value > values[place - 1]; place--) values[place] = values[place - 1], ids[place] = ids[place - 1];
    values[place] = value, ids[place] = id;
  }
};

// Of row[begin] to row[end], which are at least as many as `top` holds.
template <class T>
void scan(const T* row, int64_t begin, int64_t end, Top top) {
  int64_t i = begin;
  for (; i < begin + top.count; i++) top.offer(widened(row[i]), i);
  for (; i + 4 * WIDTH <= end; i += 4 * WIDTH) {
    const floats a = load(row + i), b = load(row + i + WIDTH);
    const floats c = load(row + i + 2 * WIDTH), d = load(row + i + 3 * WIDTH);
    const floats ab = a > b ? a : b, cd = c > d ? c : d;
    if (any_above(ab > cd ? ab : cd, top.last()))
      for (int64_t j = i; j < i + 4 * WIDTH; j++) top.offer(widened(row[j]), j);
  }
  for (; i < end; i++) top.offer(widened(row[i]), i);
}

template <class T>
void scan_all(const Tensor& logits, Tensor& values, Tensor& ids, int64_t count) {
  const int64_t width = logits.size(1), rows = logits.size(0);
  if (!rows) return;
  const int64_t most = std::max<int64_t>(1, width / std::max(LEAST, count));
  const int64_t parts = std::min(most, (TASKS + rows - 1) / rows), size = (width + parts - 1) / parts;
  std::vector<float> part_values(rows * parts * count);
  std::vector<int64_t> part_ids(rows * parts * count);
  auto part = [&](int64_t task) { return Top{&part_values[task * count], &part_ids[task * count], count}; };
  in_parallel(rows * parts, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t from = task % parts * size;
      scan(data<T>(logits) + task / parts * width, from, std::min(width, from + size), part(task));
    }
  });
  for (int64_t r = 0; r < rows; r++) {
    Top top{data<float>(values) + r * count, data<int64_t>(ids) + r * count, count};
    for (int64_t task = r * parts; task < (r + 1) * parts; task++)
      for (int64_t i = 0; i < count; i++) top.offer(part(task).values[i], part(task).ids[i]);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> top_tokens(const Tensor& logits, int64_t count) {
  const std::vector<int64_t> shape{logits.size(0), count};
  Tensor values = torch::stable::new_empty(logits, shape, ScalarType::Float);
  Tensor ids = torch::stable::new_empty(logits, shape, ScalarType::Long);
  const Tensor rows = torch::stable::contiguous(logits);
  if (logits.scalar_type() == ScalarType::BFloat16)
    scan_all<bfloat16>(rows, values, ids, count);
  else
    scan_all<float>(rows, values, ids, count);
  return {values, ids};
}

}  // namespace specgen
