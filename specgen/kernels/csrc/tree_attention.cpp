// Attention of the rows of many sequences over a paged pool of keys and values, each row over its own path.
//
// A row sees its sequence's committed prefix and, of the tail behind it, itself and its ancestors. Whatever stands
// beside it, its arithmetic is the same: scores are single dot products; the softmax and the sum over values go along
// the row's path in the order of positions. Softmax: float32, the two passes of the textbook.
#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "plan.h"
#include "dot.h"
#include "tensors.h"
#include "amx.h"
#include "weighted_sum.h"
#include "simd.h"

namespace specgen {
namespace {

constexpr int64_t AHEAD = 4;     // pages of keys that are asked for before their turn
constexpr int64_t QUERIES = 16;  // of a task, if it works with tiles: they fill one
constexpr int64_t MOST_QUERIES = 48;  // of a task without: what it keeps of each must not fill the cache
static_assert(2 * WIDTH >= PAGE, "lines of scores are longer by as much: room for a page behind the last");

// Ask for the numbers of one head in all slots of a page: pages lie anywhere, so no core foresees them.
template <class T>
void prefetch_page(const T* at, int64_t stride, int64_t dim) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t slot = 0; slot < PAGE; slot++)
    for (int64_t d = 0; d < dim; d += line) __builtin_prefetch(at + slot * stride + d);
}

template <class T>
bool tiled(const Shape& shape) {
  return std::is_same_v<T, bfloat16> && tiles_allowed() && shape.key_dim % 32 == 0 && shape.group <= QUERIES;
}

// ---- scores of some queries with the keys of two pages

template <class T>
class Queries {
 public:
  // Queries of rows [begin, end) of one KV head: [row][head of the group].
  Queries(const Heads<const T>& query, const Shape& shape, int64_t head, int64_t begin, int64_t end)
      : shape_(shape), count_((end - begin) * shape.group), dims_(rounded_up(shape.key_dim, SQUARE)),
        lines_(std::make_unique_for_overwrite<Number[]>(count_ * dims_)),
        columns_(std::make_unique_for_overwrite<Number[]>(KEYS * dims_)) {
    std::memset(lines_.get(), 0, count_ * dims_ * sizeof(Number));
    for (int64_t r = begin; r < end; r++)
      for (int64_t g = 0; g < shape.group; g++)
        as_row(query(r, head * shape.group + g), &lines_[((r - begin) * shape.group + g) * dims_], shape.key_dim);
#ifdef __AMX_BF16__
    if (tiled<T>(shape)) interleave();
#endif
  }

  // scores[query][key] of the keys of two pages, lines of scores `stride` apart.
  void score(const T* const (&pages)[2], int64_t key_stride, float* scores, int64_t stride) {
#ifdef __AMX_BF16__
    if (tiled<T>(shape_)) {
      for (int64_t i = 0; i < 2; i++) score_tiles(pages[i], key_stride, scores + i * PAGE, stride);
      return;
    }
#endif
    for (int64_t k = 0; k < KEYS; k += WIDTH) stand(pages[k / PAGE] + k % PAGE * key_stride, key_stride, k);
    for (int64_t q = 0; q < count_; q += TOGETHER)
      for (int64_t k = 0; k < KEYS; k += VECTORS * WIDTH)
        with_constant<TOGETHER>(std::min(TOGETHER, count_ - q), [&](auto R) {
          score_some<R>(&lines_[q * dims_], &columns_[k * STEP], scores + q * stride + k, stride);
        });
  }

 private:
  using Number = Row<T>;
  static constexpr int64_t STEP = Products<Number>::INPUTS, SQUARE = WIDTH * STEP, KEYS = 2 * PAGE;
  // Sums that are independent: more than a product takes cycles, as many as find room.
  static constexpr int64_t TOGETHER = 8, VECTORS = REGISTERS / 16;

  // A vector's number of keys, side by side from column `k` on: [dims / STEP][KEYS][STEP].
  void stand(const T* keys, int64_t stride, int64_t k) {
    for (int64_t d = 0; d < shape_.key_dim; d += SQUARE) {
      words square[WIDTH];
      for (int64_t i = 0; i < WIDTH; i++) square[i] = words_of_some(keys + i * stride + d, shape_.key_dim - d);
      transpose(square);
      for (int64_t i = 0; i < WIDTH; i++)
        std::memcpy(&columns_[d * KEYS + (i * KEYS + k) * STEP], &square[i], sizeof square[i]);
    }
  }

  // R queries with VECTORS of keys.
  template <int R>
  void score_some(const Number* lines, const Number* columns, float* scores, int64_t stride) const {
    using P = Products<Number>;
    floats sums[R][VECTORS] = {};
    for (int64_t d = 0; d < shape_.key_dim; d += STEP) {
      decltype(P::load(columns)) keys[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) keys[v] = P::load(columns + d * KEYS + v * WIDTH * STEP);
#pragma GCC unroll 8
      for (int64_t i = 0; i < R; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[i][v] = P::add(sums[i][v], lines + i * dims_ + d, keys[v]);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < R; i++)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) store(scores + i * stride + v * WIDTH, sums[i][v]);
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
  std::unique_ptr<Number[]> lines_, columns_;
  std::vector<T> pairs_;
};

// ---- softmax along a path

// scores[0, count) become weights that are not yet divided by their sum, which is returned.
float soften(float* scores, int64_t count, const Scoring& scoring, int64_t head) {
  const float least = -std::numeric_limits<float>::infinity();
  floats best = all(scoring.sinks ? scoring.sinks[head] : least);
  for (int64_t i = 0; i < count; i += WIDTH) {
    floats x = load(scores + i) * scoring.scale;
    if (scoring.softcap)
      for (int j = 0; j < WIDTH; j++) x[j] = std::tanh(x[j] / scoring.softcap) * scoring.softcap;
    x = (ints)numbered() < int32_t(std::min(WIDTH, count - i)) ? x : all(least);
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
    const float* from = scores + q * line + path.first_score() - low;
    bfloat16* at = &weights[q * width + path.first_position() - begin];
    const int64_t count = path.length(segment.prefix);
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
        store(to(q) + d + v * WIDTH, load(sums[v][q]) / totals[q]);
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
  int64_t low = segment.prefix + segment.tail, high = segment.prefix;
  for (int64_t r = begin; r < end; r++) {
    paths.push_back(plan.path(segment, r, scoring));
    const Path& path = paths.back();
    low = std::min(low, path.first_score());
    // The last of a path is the row itself.
    high = std::max(high, segment.prefix + path.at(path.count - 1) + 1);
  }
  low = low / PAGE * PAGE;
  const int64_t line = rounded_up(high - low, PAGE) + 2 * WIDTH;
  scores.resize(std::max<size_t>(scores.size(), line * (end - begin) * shape.group));
  Queries<T> queries(query, shape, head, segment.first_row + begin, segment.first_row + end);
#ifdef __AMX_BF16__
  if (tiled<T>(shape)) set_tiles(WIDTH, 0);
#endif
  for (int64_t position = low; position < high; position += 2 * PAGE) {
    const T* pages[2];
    for (int64_t i = 0; i < 2; i++) {
      // Behind the last page the scores of any are as good: nobody looks at them.
      const int64_t slot = plan.slot(segment, std::min(position + i * PAGE, high - 1) / PAGE * PAGE);
      const int64_t ahead = position + (AHEAD + i) * PAGE;
      if (ahead < high) prefetch_page(keys(plan.slot(segment, ahead), head), keys.row, shape.key_dim);
      prefetch_page(values(slot, head), values.row, shape.value_dim);
      pages[i] = keys(slot, head);
    }
    queries.score(pages, keys.row, scores.data() + position - low, line);
  }
#ifdef __AMX_BF16__
  if (tiled<T>(shape)) _tile_release();
#endif
  std::vector<float> totals((end - begin) * shape.group);
  for (int64_t q = 0; q < (end - begin) * shape.group; q++) {
    const Path& path = paths[q / shape.group];
    const int64_t committed = segment.prefix - path.first;
    float* along = scores.data() + q * line + path.first_score() - low;
    // Ancestors move up: they stand in order, so none is overwritten before it has moved.
    if (path.listed)
      for (int64_t i = 0; i < path.count; i++) along[committed + i] = along[committed + path.at(i)];
    totals[q] = soften(along, path.length(segment.prefix), scoring, head * shape.group + q % shape.group);
  }
  const auto to = [&](int64_t q) {
    const int64_t row = segment.first_row + begin + q / shape.group;
    return out + ((row * shape.kv_heads + head) * shape.group + q % shape.group) * shape.value_dim;
  };
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<T, bfloat16>)
    if (tiled<T>(shape) && shape.value_dim % WIDTH == 0)
      return weigh_tiled(plan, segment, shape, paths, values, scores.data(), low, line, totals, head, to);
#endif
  std::vector<int32_t> slots(high - low);
  for (int64_t i = 0; i < high - low; i++) slots[i] = plan.slot(segment, low + i);
  Values<T> weighted(values, shape, head, segment.prefix, paths, low, std::move(slots));
  weighted.weigh(scores.data(), line);
  for (size_t q = 0; q < totals.size(); q++)
    for (int64_t d = 0; d < shape.value_dim; d += WIDTH)
      store_some(to(q) + d, load(weighted.sums(q) + d) / totals[q], shape.value_dim - d);
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

// Rows of a task: a tile of queries; or as many as share the work of reading a page, but some for each thread.
template <class T>
int64_t rows_together(const Plan& plan, const Segment& segment, const Shape& shape) {
  if (tiled<T>(shape)) return QUERIES / shape.group;
  const int64_t heads = plan.segments() * shape.kv_heads, wanted = 2 * torch::stable::get_num_threads();
  const int64_t most = std::max<int64_t>(1, MOST_QUERIES / shape.group);
  return std::clamp<int64_t>(parts_of(segment.rows, parts_of(wanted, heads)), 1, most);
}

template <class T>
std::vector<Task> tasks(const Plan& plan, const Shape& shape) {
  std::vector<Task> found;
  for (int64_t s = 0; s < plan.segments(); s++) {
    const Segment& segment = plan.segment(s);
    const int64_t step = rows_together<T>(plan, segment, shape);
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
  const std::vector<Task> work = tasks<T>(plan, shape);
  // Later rows of a prompt see more: whoever is done takes the next; where there are many, several heads of the same
  // rows, which lie side by side.
  std::atomic<size_t> next{0};
  const int64_t shares = work.size() / (8 * torch::stable::get_num_threads());
  const size_t taken = std::clamp<int64_t>(shares, 1, shape.kv_heads);
  in_parallel(std::min<int64_t>(work.size(), torch::stable::get_num_threads()), [&](int64_t, int64_t) {
    for (size_t first; (first = next.fetch_add(taken)) < work.size();)
      for (size_t i = first; i < std::min(first + taken, work.size()); i++)
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
