// Attention of the rows of many sequences over a paged pool of keys and values, each row over its own path.
//
// A row sees its sequence's committed prefix and, of the tail behind it, itself and its ancestors. Whatever stands
// beside it, its arithmetic is the same: scores are single dot products; the softmax and the sum over values go along
// the row's path in the order of positions. Softmax: float32, the two passes of the textbook.
#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "plan.h"
#include "products.h"
#include "tensors.h"
#include "tiles.h"
#include "values.h"
#include "vector.h"

namespace specgen {
namespace {

constexpr int64_t AHEAD = 3;     // pages of keys that are asked for before their turn
constexpr int64_t QUERIES = 16;  // that are scored together: they fill a tile

// Ask for the numbers of one head in all slots of a page: pages lie anywhere, so no core foresees them.
template <class T>
void prefetch_page(const T* at, int64_t stride, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t slot = 0; slot < PAGE; slot++)
    for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(at + slot * stride + d);
}

// ---- scores of up to 16 queries with the keys of one page

template <class T>
class Queries {
 public:
  // Queries of rows [begin, end) of one KV head: [row][head of the group].
  Queries(const Heads<const T>& query, const Shape& shape, int64_t head, int64_t begin, int64_t end)
      : shape_(shape), count_((end - begin) * shape.group), dims_(rounded_up(shape.key_dim, SQUARE)) {
    lines_.resize(rounded_up(count_, TOGETHER) * dims_);
    columns_.resize(PAGE * dims_);
    for (int64_t r = begin; r < end; r++)
      for (int64_t g = 0; g < shape.group; g++)
        as_row(query(r, head * shape.group + g), &lines_[((r - begin) * shape.group + g) * dims_], shape.key_dim);
#ifdef __AMX_BF16__
    if (tiled()) interleave();
#endif
  }

  bool tiled() const {
    return std::is_same_v<T, bfloat16> && tiles_allowed() && shape_.key_dim % 32 == 0 && count_ <= QUERIES;
  }

  // scores[query][key] of the page's keys, lines of scores `stride` apart.
  void score(const T* keys, int64_t key_stride, float* scores, int64_t stride) {
#ifdef __AMX_BF16__
    if (tiled()) return score_tiles(keys, key_stride, scores, stride);
#endif
    stand(keys, key_stride);
    for (int64_t q = 0; q < count_; q += TOGETHER)
      for (int64_t k = 0; k < PAGE; k += WIDTH)
        score_some(q, &columns_[k * STEP], scores + q * stride + k, stride);
  }

 private:
  using Number = Row<T>;
  static constexpr int64_t STEP = Products<Number>::INPUTS, SQUARE = WIDTH * STEP;
  static constexpr int64_t TOGETHER = 8;  // sums that are independent: more than a product takes cycles

  // Keys side by side: [dims / STEP][PAGE][STEP].
  void stand(const T* keys, int64_t stride) {
    for (int64_t d = 0; d < shape_.key_dim; d += SQUARE)
      for (int64_t k = 0; k < PAGE; k += WIDTH) {
        words square[WIDTH];
        for (int64_t i = 0; i < WIDTH; i++)
          square[i] = words_of_some(keys + (k + i) * stride + d, shape_.key_dim - d);
        transpose(square);
        for (int64_t i = 0; i < WIDTH; i++)
          std::memcpy(&columns_[d * PAGE + (i * PAGE + k) * STEP], &square[i], sizeof square[i]);
      }
  }

  // Up to TOGETHER queries from `q` on with WIDTH keys.
  void score_some(int64_t q, const Number* columns, float* scores, int64_t stride) const {
    floats sums[TOGETHER] = {};
    for (int64_t d = 0; d < shape_.key_dim; d += STEP) {
      const auto keys = Products<Number>::load(columns + d * PAGE);
#pragma GCC unroll 8
      for (int64_t i = 0; i < TOGETHER; i++)
        sums[i] = Products<Number>::add(sums[i], &lines_[(q + i) * dims_ + d], keys);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < TOGETHER; i++)
      if (q + i < count_) store(scores + i * stride, sums[i]);
  }

#ifdef __AMX_BF16__
  // [dims / 32][16 pairs of dims][16 queries][2]
  void interleave() {
    pairs_.resize(shape_.key_dim * QUERIES);
    for (int64_t q = 0; q < count_; q++)
      for (int64_t d = 0; d < shape_.key_dim; d++)
        pairs_[(d / 2 * QUERIES + q) * 2 + d % 2] = lines_[q * dims_ + d];
  }

  void score_tiles(const T* keys, int64_t key_stride, float* scores, int64_t stride) const {
    alignas(64) float sums[PAGE][QUERIES];
    _tile_zero(0);
    for (int64_t d = 0; d < shape_.key_dim; d += 32) {
      _tile_loadd(4, keys + d, key_stride * sizeof(T));
      _tile_loadd(6, &pairs_[d * QUERIES], 64);
      _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
    for (int64_t q = 0; q < count_; q++)
      for (int64_t k = 0; k < PAGE; k++) scores[q * stride + k] = sums[k][q];
  }
#endif

  Shape shape_;
  int64_t count_, dims_;
  std::vector<Number> lines_, columns_;
  std::vector<T> pairs_;
};

// ---- softmax along a path

// scores[0, count) become weights that are not yet divided by their sum, which is returned.
float soften(float* scores, int64_t count, const Scoring& scoring, int64_t head) {
  const float least = -std::numeric_limits<float>::infinity();
  for (int64_t i = count; i < rounded_up(count, WIDTH); i++) scores[i] = least;
  floats best = all(scoring.sinks ? scoring.sinks[head] : least);
  for (int64_t i = 0; i < count; i += WIDTH) {
    floats x = load(scores + i) * scoring.scale;
    if (scoring.softcap)
      for (int j = 0; j < WIDTH; j++) x[j] = std::tanh(x[j] / scoring.softcap) * scoring.softcap;
    if (i + WIDTH > count)
      for (int64_t j = count - i; j < WIDTH; j++) x[j] = least;
    store(scores + i, x);
    best = x > best ? x : best;
  }
  const float top = largest(best);
  floats total{};
  for (int64_t i = 0; i < count; i += WIDTH) {
    const floats x = exp(load(scores + i) - top);
    store(scores + i, x);
    total += x;
  }
  return sum(total) + (scoring.sinks ? exp(all(scoring.sinks[head] - top))[0] : 0.0f);
}

#ifdef __AMX_BF16__
// scores: of each query a line of `line` weights, of which those of a path begin at its first key, counted from `low`.
template <class To>
void weigh_tiled(const Plan& plan, const Segment& segment, const Shape& shape, const std::vector<Path>& paths,
                 const Heads<bfloat16>& values, const float* scores, int64_t low, int64_t line,
                 const std::vector<float>& totals, int64_t head, const To& to) {
  const int64_t begin = low / TiledValues::BLOCK * TiledValues::BLOCK, queries = totals.size();
  int64_t end = begin;
  for (const Path& path : paths) end = std::max(end, path.end_position(segment.prefix));
  const int64_t width = rounded_up(end - begin, TiledValues::BLOCK);
  std::vector<bfloat16> weights(queries * width);
  for (int64_t q = 0; q < queries; q++) {
    const Path& path = paths[q / shape.group];
    const float* from = scores + q * line + path.first - low;
    bfloat16* at = &weights[q * width + path.first_position() - begin];
    const int64_t count = segment.prefix - path.first + path.count;
    for (int64_t i = 0; i < count; i += WIDTH) store_some(at + i, load(from + i), count - i);
  }
  set_tiles(queries, queries);
  TiledValues weighted(plan, segment, values, head);
  alignas(64) float sums[4][WIDTH][WIDTH];
  for (int64_t d = 0; d < shape.value_dim; d += TiledValues::DIMS) {
    const int64_t dims = std::min(TiledValues::DIMS, shape.value_dim - d);
    weighted.weigh(paths, shape.group, weights, begin, width, d, dims, sums);
    for (int64_t q = 0; q < queries; q++)
      for (int64_t v = 0; v * WIDTH < dims; v++)
        store(to(q / shape.group) + q % shape.group * shape.value_dim + d + v * WIDTH, load(sums[v][q]) / totals[q]);
  }
  _tile_release();
}
#endif

// ---- one task: rows [begin, end) of a segment, one KV head

template <class T>
void attend_rows(const Plan& plan, const Segment& segment, const Shape& shape, const Scoring& scoring,
                 const Heads<const T>& query, const Heads<T>& keys, const Heads<T>& values, T* out, int64_t head,
                 int64_t begin, int64_t end) {
  static thread_local std::vector<float> scores;
  std::vector<Path> paths;
  int64_t low = segment.prefix, high = segment.prefix;
  for (int64_t r = begin; r < end; r++) {
    paths.push_back(plan.path(segment, r, scoring));
    const Path& path = paths.back();
    low = std::min(low, path.first);
    // The last of a path is the row itself.
    high = std::max(high, segment.prefix + path.at(path.count - 1) + 1);
  }
  low = low / PAGE * PAGE;
  const int64_t line = rounded_up(high - low, PAGE) + 2 * WIDTH;
  scores.resize(std::max<size_t>(scores.size(), line * (end - begin) * shape.group));
  Queries<T> queries(query, shape, head, segment.first_row + begin, segment.first_row + end);
#ifdef __AMX_BF16__
  if (queries.tiled()) set_tiles(WIDTH, 0);
#endif
  for (int64_t position = low; position < high; position += PAGE) {
    const int64_t slot = plan.slot(segment, position), ahead = position + AHEAD * PAGE;
    if (ahead < high) prefetch_page(keys(plan.slot(segment, ahead), head), keys.row, shape.key_dim);
    prefetch_page(values(slot, head), values.row, shape.value_dim);
    queries.score(keys(slot, head), keys.row, scores.data() + position - low, line);
  }
#ifdef __AMX_BF16__
  if (queries.tiled()) _tile_release();
#endif
  std::vector<float> totals((end - begin) * shape.group);
  for (int64_t r = 0; r < end - begin; r++) {
    const Path& path = paths[r];
    const int64_t committed = segment.prefix - path.first;
    for (int64_t g = 0; g < shape.group; g++) {
      float* along = scores.data() + (r * shape.group + g) * line + path.first - low;
      // Ancestors move up: they stand in order, so none is overwritten before it has moved.
      for (int64_t i = 0; i < path.count; i++) along[committed + i] = along[committed + path.at(i)];
      totals[r * shape.group + g] = soften(along, committed + path.count, scoring, head * shape.group + g);
    }
  }
  const auto to = [&](int64_t r) {
    return out + ((segment.first_row + begin + r) * shape.kv_heads + head) * shape.group * shape.value_dim;
  };
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<T, bfloat16>)
    if (queries.tiled() && shape.value_dim % WIDTH == 0)
      return weigh_tiled(plan, segment, shape, paths, values, scores.data(), low, line, totals, head, to);
#endif
  const Values<T> weighted(plan, segment, values, shape, head);
  for (int64_t r = 0; r < end - begin; r++)
    weighted.weigh(paths[r], scores.data() + r * shape.group * line + paths[r].first - low, line,
                   &totals[r * shape.group], to(r));
}

template <class T>
void keep(const Plan& plan, const Heads<const T>& rows, const Heads<T>& kept, int64_t kv_heads, int64_t dim) {
  for (int64_t s = 0; s < plan.segments(); s++) {
    const Segment& segment = plan.segment(s);
    const int64_t begin = segment.prefix + segment.tail - segment.rows;
    for (int64_t r = 0; r < segment.rows; r++)
      for (int64_t h = 0; h < kv_heads; h++)
        std::memcpy(kept(plan.slot(segment, begin + r), h), rows(segment.first_row + r, h), dim * sizeof(T));
  }
}

struct Task {
  const Segment* segment;
  int64_t head, begin, end;
};

std::vector<Task> tasks(const Plan& plan, const Shape& shape) {
  const int64_t step = std::max<int64_t>(1, QUERIES / shape.group);
  std::vector<Task> found;
  for (int64_t s = 0; s < plan.segments(); s++) {
    const Segment& segment = plan.segment(s);
    for (int64_t begin = 0; begin < segment.rows; begin += step)
      for (int64_t head = 0; head < shape.kv_heads; head++)
        found.push_back({&segment, head, begin, std::min<int64_t>(begin + step, segment.rows)});
  }
  return found;
}

template <class T>
void attend_all(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys, const Tensor& values,
                const Plan& plan, const Shape& shape, const Scoring& scoring, Tensor& out) {
  const Heads<T> kept_keys = heads<T>(keys), kept_values = heads<T>(values);
  keep(plan, heads<const T>(key), kept_keys, shape.kv_heads, shape.key_dim);
  keep(plan, heads<const T>(value), kept_values, shape.kv_heads, shape.value_dim);
  const Heads<const T> queries = heads<const T>(query);
  const std::vector<Task> work = tasks(plan, shape);
  // Later rows of a prompt see more: whoever is done takes the next.
  std::atomic<size_t> next{0};
  in_parallel(std::min<int64_t>(work.size(), torch::stable::get_num_threads()), [&](int64_t, int64_t) {
    for (size_t i; (i = next++) < work.size();)
      attend_rows(plan, *work[i].segment, shape, scoring, queries, kept_keys, kept_values, data<T>(out), work[i].head,
                  work[i].begin, work[i].end);
  });
}

}  // namespace

Tensor tree_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& keys,
                      const Tensor& values, const Tensor& plan, double scale, double softcap,
                      const std::optional<Tensor>& sinks, int64_t window, int64_t chunk) {
  const Shape shape{key.size(1), query.size(1) / key.size(1), query.size(2), value.size(2)};
  const Scoring scoring{float(scale), float(softcap), sinks ? data<float>(*sinks) : nullptr, window, chunk};
  // Zeros for the rows that fill up a batch and belong to no sequence.
  Tensor out = torch::stable::new_zeros(query, {query.size(0), query.size(1), shape.value_dim});
  if (query.scalar_type() == ScalarType::BFloat16)
    attend_all<bfloat16>(query, key, value, keys, values, Plan(plan), shape, scoring, out);
  else
    attend_all<float>(query, key, value, keys, values, Plan(plan), shape, scoring, out);
  return out;
}

}  // namespace specgen
