// The weighted sum of values along the rows' paths.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "plan.h"
#include "amx.h"
#include "simd.h"

namespace specgen {

// Adds the values in `count` slots to the sums of G queries, sums[G][dims], whose weights stand in lines: V vectors of
// dims, or what `width` leaves of one.
template <int G, int V, class T>
void add_dims(const T* values, int64_t row, const int32_t* slots, int64_t count, const float* weights, int64_t line,
              float* sums, int64_t dims, int64_t width) {
  floats sum[G][V];
#pragma GCC unroll 6
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[g][v] = load(sums + g * dims + v * WIDTH);
  for (int64_t i = 0; i < count; i++) {
    const T* value = values + slots[i] * row;
    floats x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) x[v] = V == 1 ? load_some(value, width) : load(value + v * WIDTH);
#pragma GCC unroll 6
    for (int g = 0; g < G; g++) {
      const floats weight = all(weights[g * line + i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[g][v] = fma(weight, x[v], sum[g][v]);
    }
  }
#pragma GCC unroll 6
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(sums + g * dims + v * WIDTH, sum[g][v]);
}

// All `width` dims of them.
template <int G, class T>
void add_values(const T* values, int64_t row, const int32_t* slots, int64_t count, const float* weights, int64_t line,
                float* sums, int64_t dims, int64_t width) {
  constexpr int V = REGISTERS / 8;  // the sums of six queries, the values and a weight just find room
  int64_t d = 0;
  for (; d + V * WIDTH <= width; d += V * WIDTH)
    add_dims<G, V>(values + d, row, slots, count, weights, line, sums + d, dims, width - d);
  for (; d < width; d += WIDTH)
    add_dims<G, 1>(values + d, row, slots, count, weights, line, sums + d, dims, width - d);
}

// Of the queries of some rows of a segment with one KV head: [row][head of the group].
template <class T>
class Values {
 public:
  // Slots of positions from `low` on, as far as any row sees.
  Values(const Heads<T>& values, const Shape& shape, int64_t head, int64_t prefix, const std::vector<Path>& paths,
         int64_t low, std::vector<int32_t> slots)
      : at_(values(0, head)), row_(values.row), shape_(shape), prefix_(prefix), paths_(paths), low_(low),
        slots_(std::move(slots)), dims_(rounded_up(shape.value_dim, WIDTH)),
        sums_(paths.size() * shape.group * dims_) {}

  // weights: of each query a line, in which those of a path begin at its `first_score`, counted from `low`.
  void weigh(const float* weights, int64_t line) {
    const int64_t high = low_ + slots_.size();
    int64_t begin = low_, end = paths_[0].listed ? prefix_ : paths_[0].end_position(prefix_);
    for (const Path& path : paths_) begin = std::max(begin, path.first_score());
    end = std::max(begin, end);
    for (size_t r = 0; r < paths_.size(); r++) alone(r, paths_[r].first_score(), begin, weights, line);
    // All rows see these; a part of them at a time stays in the cache.
    for (int64_t at = begin; at < end; at += SHARED)
      add(0, sums_.size() / dims_, &slots_[at - low_], std::min(SHARED, end - at), weights + at - low_, line);
    for (size_t r = 0; r < paths_.size(); r++) alone(r, end, high, weights, line);
  }

  const float* sums(int64_t query) const { return &sums_[query * dims_]; }

 private:
  static constexpr int64_t SHARED = 128, TOGETHER = 6;  // keys; queries

  // Of one row what lies in its line of weights from one place to another.
  void alone(int64_t r, int64_t begin, int64_t end, const float* weights, int64_t line) {
    const Path& path = paths_[r];
    end = std::min(end, path.first_score() + path.length(prefix_));
    if (begin >= end) return;
    std::vector<int32_t> slots;
    for (int64_t at = begin; at < end; at++) {
      const int64_t behind = at - prefix_;
      slots.push_back(slots_[(path.listed && behind >= 0 ? prefix_ + path.at(behind) : at) - low_]);
    }
    add(r * shape_.group, shape_.group, slots.data(), slots.size(), weights + begin - low_, line);
  }

  void add(int64_t query, int64_t queries, const int32_t* slots, int64_t count, const float* weights, int64_t line) {
    in_parts(queries, TOGETHER, [&](int64_t begin, int64_t size) {
      const int64_t q = query + begin;
      with_constant<TOGETHER>(size, [&](auto G) {
        add_values<G>(at_, row_, slots, count, weights + q * line, line, &sums_[q * dims_], dims_, shape_.value_dim);
      });
    });
  }

  const T* at_;
  int64_t row_;
  const Shape& shape_;
  int64_t prefix_;
  const std::vector<Path>& paths_;
  int64_t low_;
  std::vector<int32_t> slots_;
  int64_t dims_;
  std::vector<float> sums_;
};

#ifdef __AMX_BF16__
// The same with tiles, for all queries of a task: blocks of 32 positions, counted from the sequence's begin, so that a
// key adds to a row at the same place whether it is committed, an ancestor in a tree, or one of a chain. What a row does
// not see has the weight 0, which leaves its sums as they are.
class TiledValues {
 public:
  static constexpr int64_t BLOCK = 32, DIMS = 4 * WIDTH;

  TiledValues(const Plan& plan, const Segment& segment, const Heads<bfloat16>& values, int64_t head)
      : plan_(plan), segment_(segment), values_(values), head_(head) {}

  // weights: of each query a line over positions [low, low + line), multiples of 32; sums: [dims / 16][16][16] of up to
  // 64 dims from `d` on. `group` queries belong to each of the paths.
  void weigh(const std::vector<Path>& paths, int64_t group, const std::vector<bfloat16>& weights, int64_t low,
             int64_t line, int64_t d, int64_t dims, float (*sums)[WIDTH][WIDTH]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t at = 0; at < line; at += BLOCK) {
      const int64_t position = low + at;
      if (!paths[0].listed || position + BLOCK <= segment_.prefix) {
        const int64_t end = std::max(segment_.prefix, int32_t(paths.back().end_position(segment_.prefix)));
        pack(d, dims, std::min(BLOCK, end - position), [&](int64_t i) { return plan_.slot(segment_, position + i); });
        add(&weights[at], line, dims);
      } else {
        for (size_t p = 0; p < paths.size(); p++) add_alone(paths[p], p, group, weights, position, at, line, d, dims);
      }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  }

 private:
  // A block in which each path of a tree has values of its own.
  void add_alone(const Path& path, int64_t number, int64_t group, const std::vector<bfloat16>& weights,
                 int64_t position, int64_t at, int64_t line, int64_t d, int64_t dims) {
    const int64_t count = std::min(BLOCK, path.end_position(segment_.prefix) - position);
    if (count <= 0) return;
    pack(d, dims, count, [&](int64_t i) {
      const int64_t behind = position + i - segment_.prefix - path.begin;
      return plan_.slot(segment_, behind < 0 ? position + i : segment_.prefix + path.at(behind));
    });
    alignas(64) bfloat16 mine[WIDTH][BLOCK] = {};
    for (int64_t q = number * group; q < (number + 1) * group; q++)
      std::memcpy(mine[q], &weights[q * line + at], sizeof mine[q]);
    add(mine[0], BLOCK, dims);
  }

  // Values of `count` positions, of which two lie side by side: [dims / 16][16 pairs][16 dims][2], zeros behind them.
  template <class Slot>
  void pack(int64_t d, int64_t dims, int64_t count, const Slot& slot) {
    static const bfloat16 nothing[DIMS] = {};
    for (int64_t pair = 0; pair < WIDTH; pair++) {
      const int64_t i = 2 * pair;
      const bfloat16* even = i < count ? values_(slot(i), head_) + d : nothing;
      const bfloat16* odd = i + 1 < count ? values_(slot(i + 1), head_) + d : nothing;
      for (int64_t v = 0; v * WIDTH < dims; v++) {
        const words both = load_bits(even + v * WIDTH) | load_bits(odd + v * WIDTH) << 16;
        std::memcpy(packed_[v][pair], &both, sizeof both);
      }
    }
  }

  void add(const bfloat16* weights, int64_t line, int64_t dims) const {
    _tile_loadd(4, weights, line * sizeof(bfloat16));
    _tile_loadd(6, packed_[0], 64);
    _tile_dpbf16ps(0, 4, 6);
    if (dims > WIDTH) {
      _tile_loadd(7, packed_[1], 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (dims > 2 * WIDTH) {
      _tile_loadd(6, packed_[2], 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if (dims > 3 * WIDTH) {
      _tile_loadd(7, packed_[3], 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }

  const Plan& plan_;
  const Segment& segment_;
  const Heads<bfloat16>& values_;
  int64_t head_;
  alignas(64) bfloat16 packed_[4][WIDTH][BLOCK] = {};
};
#endif

}  // namespace specgen
