// What the attention kernel is told of the sequences in a call: specgen/model/attention/cpu_plan.py writes it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tensors.h"

namespace specgen {

constexpr int64_t PAGE = 16;

// One sequence in the plan, int32[SEGMENT] each, behind the plan's first number, which counts them.
// The tail's last `rows` rows are those of this call. What lies at `pages`, `ancestors` and so on is counted from the
// plan's begin; `starts` is -1 where each row sees all of the tail before it.
struct Segment {
  int32_t first_row, rows, prefix, tail, pages, starts;
  static constexpr int64_t SIZE = 6;
};

template <class T>
struct Heads {  // [n, heads, dim], dims next to one another
  T* at;
  int64_t row, head;
  T* operator()(int64_t r, int64_t h) const { return at + r * row + h * head; }
};

template <class T>
Heads<T> heads(const Tensor& x) {
  STD_TORCH_CHECK(x.stride(2) == 1, "the numbers of a head must lie side by side");
  return {data<T>(x), x.stride(0), x.stride(1)};
}

struct Shape {
  int64_t kv_heads, group, key_dim, value_dim;
};

struct Scoring {
  float scale, softcap;
  const float* sinks;
  int64_t window, chunk;

  int64_t oldest(int64_t position) const {
    if (window) return std::max<int64_t>(0, position - window + 1);
    return chunk ? position / chunk * chunk : 0;
  }
};

// What a row sees: positions [first, prefix), then `count` rows of the tail: those listed, or all from `begin` on, which
// is how many a window hides.
struct Path {
  int64_t first, count, begin;
  const int32_t* listed;
  int64_t at(int64_t i) const { return listed ? listed[i] : begin + i; }
  // Along the path, where each key stands one behind the other, whatever rows lie between them in the tail.
  int64_t first_position() const { return first + begin; }
  int64_t end_position(int64_t prefix) const { return prefix + begin + count; }
  int64_t length(int64_t prefix) const { return prefix - first + count; }
  // Where its keys begin in a line of scores of all positions, once those that it lists stand without gaps.
  int64_t first_score() const { return listed ? first : first_position(); }
};

class Plan {
 public:
  explicit Plan(const Tensor& plan) : at_(data<int32_t>(plan)) {}
  int64_t segments() const { return at_[0]; }
  const Segment& segment(int64_t i) const {
    return *reinterpret_cast<const Segment*>(at_ + 1 + i * Segment::SIZE);
  }
  int64_t slot(const Segment& segment, int64_t position) const {
    return at_[segment.pages + position / PAGE] * PAGE + position % PAGE;
  }
  Path path(const Segment& segment, int64_t row, const Scoring& scoring) const {
    int64_t count = segment.tail - segment.rows + row + 1;
    const int32_t* listed = nullptr;
    if (segment.starts >= 0) {
      const int32_t* starts = at_ + segment.starts + row;
      count = starts[1] - starts[0];
      listed = at_ + starts[0];
    }
    const int64_t first = scoring.oldest(segment.prefix + count - 1);
    const int64_t hidden = std::max<int64_t>(0, first - segment.prefix);  // of the tail, behind a window
    return {std::min<int64_t>(first, segment.prefix), count - hidden, hidden, listed ? listed + hidden : nullptr};
  }

 private:
  const int32_t* at_;
};

}  // namespace specgen
