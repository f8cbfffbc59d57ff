// The weighted sum of values along the rows' paths.
#pragma once

#include <algorithm>
#include <vector>

#include "plan.h"
#include "tiles.h"
#include "vector.h"

namespace specgen {

// G heads of one row over V vectors of dims: adds weights[g][i] * the i-th value of the path to sums[g].
template <class T, int G, int V>
void add_values(const T* value, int64_t stride, int64_t count, const float* weights, int64_t line,
                floats (&sums)[G][V]) {
  for (int64_t i = 0; i < count; i++, value += stride)
    for (int v = 0; v < V; v++) {
      const floats x = load(value + v * WIDTH);
      for (int g = 0; g < G; g++) sums[g][v] = fma(all(weights[g * line + i]), x, sums[g][v]);
    }
}

template <class T>
class Values {
 public:
  Values(const Plan& plan, const Segment& segment, const Heads<T>& values, const Shape& shape, int64_t head)
      : plan_(plan), segment_(segment), values_(values), shape_(shape), head_(head) {}

  // Heads [0, group) of one row; weights of each head a line, out [group][value_dim].
  void weigh(const Path& path, const float* weights, int64_t line, const float* totals, T* out) const {
    for (int64_t d = 0; d < shape_.value_dim; d += 4 * WIDTH) {
      const int64_t width = std::min(shape_.value_dim - d, 4 * WIDTH);
      for (int64_t g = 0; g < shape_.group; g += 4) {
        const float* mine = weights + g * line;
        T* to = out + g * shape_.value_dim + d;
        switch (std::min<int64_t>(4, shape_.group - g)) {
          case 1: part<1>(path, mine, line, totals + g, to, d, width); break;
          case 2: part<2>(path, mine, line, totals + g, to, d, width); break;
          case 3: part<3>(path, mine, line, totals + g, to, d, width); break;
          default: part<4>(path, mine, line, totals + g, to, d, width);
        }
      }
    }
  }

 private:
  template <int G>
  void part(const Path& path, const float* weights, int64_t line, const float* totals, T* out, int64_t d,
            int64_t width) const {
    switch (width) {
      case 4 * WIDTH: return vectors<G, 4>(path, weights, line, totals, out, d);
      case 2 * WIDTH: return vectors<G, 2>(path, weights, line, totals, out, d);
    }
    int64_t done = 0;
    for (; done + WIDTH <= width; done += WIDTH) vectors<G, 1>(path, weights, line, totals, out + done, d + done);
    if (done < width) rest<G>(path, weights, line, totals, out + done, d + done, width - done);
  }

  template <int G, int V>
  void vectors(const Path& path, const float* weights, int64_t line, const float* totals, T* out, int64_t d) const {
    floats sums[G][V] = {};
    runs(path, [&](int64_t i, int64_t slot, int64_t count) {
      add_values<T, G, V>(values_(slot, head_) + d, values_.row, count, weights + i, line, sums);
    });
    for (int g = 0; g < G; g++)
      for (int v = 0; v < V; v++) store(out + g * shape_.value_dim + v * WIDTH, sums[g][v] / totals[g]);
  }

  // What is left of a head that fills no vector.
  template <int G>
  void rest(const Path& path, const float* weights, int64_t line, const float* totals, T* out, int64_t d,
            int64_t dims) const {
    floats sums[G] = {};
    runs(path, [&](int64_t i, int64_t slot, int64_t count) {
      for (int64_t j = 0; j < count; j++) {
        const floats x = load_some(values_(slot + j, head_) + d, dims);
        for (int g = 0; g < G; g++) sums[g] = fma(all(weights[g * line + i + j]), x, sums[g]);
      }
    });
    for (int g = 0; g < G; g++) store_some(out + g * shape_.value_dim, sums[g] / totals[g], dims);
  }

  // `visit(i, slot, count)`: the path's i-th to (i + count)-th key lie in consecutive slots.
  template <class F>
  void runs(const Path& path, const F& visit) const {
    const int64_t committed = segment_.prefix - path.first;
    for (int64_t i = 0; i < committed;) {
      const int64_t position = path.first + i, count = std::min(PAGE - position % PAGE, committed - i);
      visit(i, plan_.slot(segment_, position), count);
      i += count;
    }
    const int64_t behind = committed + path.count;
    for (int64_t i = committed; i < behind;) {
      const int64_t position = segment_.prefix + path.at(i - committed);
      const int64_t count = path.listed ? 1 : std::min(PAGE - position % PAGE, behind - i);
      visit(i, plan_.slot(segment_, position), count);
      i += count;
    }
  }

  const Plan& plan_;
  const Segment& segment_;
  const Heads<T>& values_;
  const Shape& shape_;
  int64_t head_;
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
