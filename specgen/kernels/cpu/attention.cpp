// Attention of the rows of many sequences over a paged pool of keys and values, each row over its own path.
//
// A row sees its sequence's committed prefix and, of the tail behind it, itself and its ancestors. Whatever stands
// beside it, its arithmetic is the same: scores are single dot products; the softmax and the sum over values go along
// the row's path in the order of positions. Softmax: float32, the two passes of the textbook.
#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "tensors.h"
#include "tiles.h"
#include "vector.h"

namespace specgen {
namespace {

constexpr int64_t PAGE = 16;
constexpr int64_t QUERIES = 16;  // that are scored together: they fill a tile

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

// What a row sees: positions [first, prefix), then `count` rows of the tail: those listed, or all from `begin` on.
struct Path {
  int64_t first, count, begin;
  const int32_t* listed;
  int64_t at(int64_t i) const { return listed ? listed[i] : begin + i; }
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

// ---- scores of up to 16 queries with the keys of one page

template <class T>
class Queries {
 public:
  // Queries of rows [begin, end) of one KV head: [row][head of the group].
  Queries(const Heads<const T>& query, const Shape& shape, int64_t head, int64_t begin, int64_t end)
      : shape_(shape), count_((end - begin) * shape.group), dims_(rounded_up(shape.key_dim, WIDTH)) {
    lines_.resize(count_ * dims_);
    for (int64_t r = begin; r < end; r++)
      for (int64_t g = 0; g < shape.group; g++)
        std::memcpy(&lines_[((r - begin) * shape.group + g) * dims_], query(r, head * shape.group + g),
                    shape.key_dim * sizeof(T));
#ifdef __AMX_BF16__
    if (tiled()) interleave();
#endif
  }

  bool tiled() const {
    return std::is_same_v<T, bfloat16> && tiles_allowed() && shape_.key_dim % 32 == 0 && count_ <= QUERIES;
  }

  // scores[query][key] of the page's keys, lines of scores `stride` apart.
  void score(const T* keys, int64_t key_stride, float* scores, int64_t stride) const {
#ifdef __AMX_BF16__
    if (tiled()) return score_tiles(keys, key_stride, scores, stride);
#endif
    for (int64_t k = 0; k < PAGE; k++)
      for (int64_t q = 0; q < count_; q++) {
        const T *x = &lines_[q * dims_], *y = keys + k * key_stride;
        floats products{};
        int64_t d = 0;
        for (; d + WIDTH <= shape_.key_dim; d += WIDTH) products += load(x + d) * load(y + d);
        if (d < shape_.key_dim) products += load(x + d) * load_some(y + d, shape_.key_dim - d);
        scores[q * stride + k] = sum(products);
      }
  }

 private:
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
  std::vector<T> lines_, pairs_;
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

// ---- the weighted sum of values

// G heads of one row over up to 16 V dims: adds weights[g][i] * the i-th value of the path to sums[g].
template <class T, int G, int V>
void add_values(const T* value, int64_t stride, int64_t count, const float* weights, int64_t line,
                floats (&sums)[G][V]) {
  for (int64_t i = 0; i < count; i++, value += stride)
    for (int v = 0; v < V; v++) {
      const floats x = load(value + v * WIDTH);
      for (int g = 0; g < G; g++) sums[g][v] += weights[g * line + i] * x;
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
    for (; done < width; done++) number<G>(path, weights, line, totals, out + done, d + done);
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

  // What is left of a head that is no multiple of 16.
  template <int G>
  void number(const Path& path, const float* weights, int64_t line, const float* totals, T* out, int64_t d) const {
    float sums[G] = {};
    runs(path, [&](int64_t i, int64_t slot, int64_t count) {
      for (int64_t j = 0; j < count; j++)
        for (int g = 0; g < G; g++)
          sums[g] += weights[g * line + i + j] * load_some(values_(slot + j, head_) + d, 1)[0];
    });
    for (int g = 0; g < G; g++) store_some(out + g * shape_.value_dim, all(sums[g] / totals[g]), 1);
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
  const Queries<T> queries(query, shape, head, segment.first_row + begin, segment.first_row + end);
#ifdef __AMX_BF16__
  if (queries.tiled()) set_tiles(WIDTH, 0);
#endif
  for (int64_t position = low; position < high; position += PAGE)
    queries.score(keys(plan.slot(segment, position), head), keys.row, scores.data() + position - low, line);
#ifdef __AMX_BF16__
  if (queries.tiled()) _tile_release();
#endif
  std::vector<float> totals(shape.group);
  const Values<T> weighted(plan, segment, values, shape, head);
  for (int64_t r = begin; r < end; r++) {
    const Path& path = paths[r - begin];
    float* mine = scores.data() + (r - begin) * shape.group * line + path.first - low;
    const int64_t committed = segment.prefix - path.first;
    for (int64_t g = 0; g < shape.group; g++) {
      float* along = mine + g * line;
      // Ancestors move up: they stand in order, so none is overwritten before it has moved.
      for (int64_t i = 0; i < path.count; i++) along[committed + i] = along[committed + path.at(i)];
      totals[g] = soften(along, committed + path.count, scoring, head * shape.group + g);
    }
    weighted.weigh(path, mine, line, totals.data(),
                   out + ((segment.first_row + r) * shape.kv_heads + head) * shape.group * shape.value_dim);
  }
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
