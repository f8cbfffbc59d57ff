// Linear layers over a few rows: the weights are read once, in the order in which they lie, and each number of the
// output is one sum in one order, whatever rows stand beside its own.
#include <algorithm>
#include <optional>
#include <vector>

#include "dot.h"
#include "tensors.h"
#include "amx.h"
#include "simd.h"

namespace specgen {
namespace {

// ---- without tiles: panels of outputs, [outputs / PANEL][inputs][PANEL], for bfloat16 products in pairs of inputs
// [outputs / PANEL][inputs / 2][PANEL][2]

constexpr int64_t ROWS = REGISTERS == 32 ? 12 : 6;
constexpr int64_t VECTORS = REGISTERS / (ROWS + 1);  // as many as leave each sum and each weight a register
constexpr int64_t PANEL = VECTORS * WIDTH;
// Rows that pass in turn over a block of a panel, which stays in the nearest cache. Meanwhile the memory is read, so far
// ahead: else it would rest until the last of them has passed.
constexpr int64_t MANY = 48;
constexpr int64_t BLOCK = 16 * 1024, AHEAD = 32 * 1024;

template <class T>
void pack_panels(const T* weight, T* packed, int64_t outputs, int64_t inputs) {
  constexpr int64_t step = Products<T>::INPUTS;
  const int64_t line = rounded_up(inputs, step);
  for (int64_t n = 0; n < rounded_up(outputs, PANEL); n++)
    for (int64_t k = 0; k < line; k++) {
      T& to = packed[(n / PANEL * line + k / step * step) * PANEL + n % PANEL * step + k % step];
      to = n < outputs && k < inputs ? weight[n * inputs + k] : T{};
    }
}

// Adds `inputs` more of them to the sums of R rows of x, which are `line` long, and reads ahead so many bytes with each
// step. All loops over sums are unrolled: sums that a variable chooses would be written to memory at each addition.
template <class T, int R>
void add_inputs(const Row<T>* x, const T* panel, float* sums, int64_t inputs, int64_t line, const char* ahead,
                int64_t bytes) {
  using P = Products<T>;
  floats sum[R][VECTORS];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sum[r][v] = load(sums + r * PANEL + v * WIDTH);
  for (int64_t k = 0; k < inputs; k += P::INPUTS, ahead += bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(ahead + i, _MM_HINT_T0);
    const T* at = panel + k * PANEL;
    decltype(P::load(at)) weights[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) weights[v] = P::load(at + v * WIDTH * P::INPUTS);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[r][v] = P::add(sum[r][v], x + r * line + k, weights[v]);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(sums + r * PANEL + v * WIDTH, sum[r][v]);
}

// Up to MANY rows.
template <class T>
void panel_rows(const Row<T>* x, const T* panel, const T* bias, T* out, int64_t rows, int64_t inputs, int64_t stride,
                int64_t width) {
  constexpr int64_t input = PANEL * sizeof(T), block = BLOCK / input;
  const int64_t bytes = parts_of(input * Products<T>::INPUTS, parts_of(rows, ROWS));
  alignas(64) float sums[MANY * PANEL];
  std::fill_n(sums, rows * PANEL, 0.0f);
  for (int64_t k = 0; k < inputs; k += block) {
    const int64_t count = std::min(block, inputs - k);
    const char* ahead = (const char*)(panel + k * PANEL) + AHEAD;
    // Few rows make poor use of a weight: parts of one size.
    in_parts(rows, ROWS, [&](int64_t r, int64_t size) {
      with_constant<ROWS>(size, [&](auto R) {
        add_inputs<T, R>(x + r * inputs + k, panel + k * PANEL, sums + r * PANEL, count, inputs, ahead, bytes);
      });
      ahead += bytes * count / Products<T>::INPUTS;
    });
  }
  for (int64_t v = 0; v < PANEL; v += WIDTH) {
    const int64_t count = width - v;
    if (count <= 0) return;
    const floats shift = bias ? load_some(bias + v, count) : floats{};
    for (int64_t r = 0; r < rows; r++)
      store_some(out + r * stride + v, load(sums + r * PANEL + v) + shift, count);
  }
}

template <class T>
void panels(const Row<T>* x, const T* packed, const T* bias, T* out, int64_t rows, int64_t outputs, int64_t inputs,
            int64_t stride, int64_t begin, int64_t end) {
  for (int64_t n = begin * PANEL; n < std::min(end * PANEL, outputs); n += PANEL)
    in_parts(rows, MANY, [&](int64_t r, int64_t size) {
      panel_rows(x + r * inputs, packed + n * inputs, bias ? bias + n : nullptr, out + r * stride + n, size, inputs,
                 stride, outputs - n);
    });
}

// ---- with tiles: [outputs / 32][inputs / 32][2][16 pairs of inputs][16 outputs][2]

constexpr int64_t TILE = 32;

void pack_tiles(const bfloat16* weight, bfloat16* packed, int64_t outputs, int64_t inputs) {
  const int64_t steps = parts_of(inputs, TILE);
  for (int64_t n = 0; n < rounded_up(outputs, TILE); n++)
    for (int64_t k = 0; k < steps * TILE; k++) {
      const int64_t tile = (n / TILE * steps + k / TILE) * 2 + n % TILE / WIDTH;
      bfloat16& to = packed[(tile * WIDTH + k % TILE / 2) * TILE + n % WIDTH * 2 + k % 2];
      to = n < outputs && k < inputs ? weight[n * inputs + k] : bfloat16{};
    }
}

#ifdef __AMX_BF16__
void store_tile(const float (*sums)[WIDTH], const bfloat16* bias, bfloat16* out, int64_t rows, int64_t stride,
                int64_t width) {
  if (width <= 0) return;
  const floats shift = bias ? load_some(bias, width) : floats{};
  for (int64_t r = 0; r < rows; r++) store_some(out + r * stride, load(sums[r]) + shift, width);
}

// With two tiles of rows the processor does not look far enough ahead to keep the memory busy.
constexpr int64_t TILES_AHEAD = 16 * 1024;

// Up to 32 rows of x, whose lines are `inputs` long and a multiple of 32.
void tile_rows(const bfloat16* x, const bfloat16* panel, const bfloat16* bias, bfloat16* out, int64_t rows,
               int64_t inputs, int64_t stride, int64_t width) {
  const int64_t upper = std::min(WIDTH, rows), lower = rows - upper, line = inputs * sizeof(bfloat16);
  alignas(64) float sums[4][WIDTH][WIDTH];
  _tile_zero(0);
  _tile_zero(1);
  if (lower) {
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < inputs; k += TILE, panel += 2 * WIDTH * TILE) {
      for (int64_t n = 0; n < 2 * WIDTH * TILE; n += TILE) _mm_prefetch(panel + TILES_AHEAD + n, _MM_HINT_T1);
      _tile_loadd(4, x + k, line);
      _tile_loadd(6, panel, 64);
      _tile_loadd(7, panel + WIDTH * TILE, 64);
      _tile_loadd(5, x + upper * inputs + k, line);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  } else {
    for (int64_t k = 0; k < inputs; k += TILE, panel += 2 * WIDTH * TILE) {
      _tile_loadd(4, x + k, line);
      _tile_loadd(6, panel, 64);
      _tile_loadd(7, panel + WIDTH * TILE, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  for (int half = 0; half < 2; half++) {
    const bfloat16* shift = bias ? bias + half * WIDTH : nullptr;
    store_tile(sums[half], shift, out + half * WIDTH, upper, stride, width - half * WIDTH);
    store_tile(sums[2 + half], shift, out + upper * stride + half * WIDTH, lower, stride, width - half * WIDTH);
  }
}

void tiles(const bfloat16* x, const bfloat16* packed, const bfloat16* bias, bfloat16* out, int64_t rows,
           int64_t outputs, int64_t inputs, int64_t stride, int64_t begin, int64_t end) {
  int64_t shaped = 0;
  for (int64_t n = begin * TILE; n < std::min(end * TILE, outputs); n += TILE)
    for (int64_t r = 0; r < rows; r += TILE) {
      const int64_t count = std::min(TILE, rows - r);
      if (count != shaped) set_tiles(std::min(WIDTH, count), std::max<int64_t>(0, count - WIDTH));
      shaped = count;
      tile_rows(x + r * inputs, packed + n * inputs, bias ? bias + n : nullptr, out + r * stride + n, count, inputs,
                stride, outputs - n);
    }
  _tile_release();
}
#endif

bool tiled(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 && tiles_allowed(); }

// Outputs that are computed together, and lie together in a packed weight.
int64_t group_of(const Tensor& x) { return tiled(x) ? TILE : PANEL; }

// Inputs that are multiplied at once: lines of x and of a packed weight are so long, or a multiple of it.
template <class T>
int64_t step_of(const Tensor& x) {
  return tiled(x) ? TILE : Products<T>::INPUTS;
}

// Rows as products take them, each `line` long, zeros behind its inputs.
template <class T>
std::vector<Row<T>> lines_of(const T* x, int64_t rows, int64_t inputs, int64_t line) {
  std::vector<Row<T>> lines(rows * line);
  for (int64_t r = 0; r < rows; r++) as_row(x + r * inputs, &lines[r * line], inputs);
  return lines;
}

// Groups `begin` to `end` of one weight.
template <class T>
void multiply(const Row<T>* x, const T* packed, const T* bias, T* out, int64_t rows, int64_t outputs, int64_t inputs,
              int64_t stride, int64_t begin, int64_t end) {
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<T, bfloat16>)
    if (tiles_allowed()) return tiles(x, packed, bias, out, rows, outputs, inputs, stride, begin, end);
#endif
  panels(x, packed, bias, out, rows, outputs, inputs, stride, begin, end);
}

// All weights in one parallel region: x [rows, inputs] to out [rows, sum of outputs].
template <class T>
void multiply_all(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& biases,
                  const std::vector<int64_t>& outputs, Tensor& out) {
  const int64_t inputs = rounded_up(x.size(-1), step_of<T>(x));
  const int64_t rows = x.numel() / x.size(-1), stride = out.size(-1), group = group_of(x);
  std::vector<Row<T>> copied;
  const Row<T>* lines = copied.data();
  if constexpr (std::is_same_v<T, Row<T>>)
    if (inputs == x.size(-1)) lines = data<T>(x);
  if (!lines) lines = (copied = lines_of(data<T>(x), rows, x.size(-1), inputs)).data();
  int64_t groups = 0;
  for (int64_t count : outputs) groups += parts_of(count, group);
  in_parallel(groups, [&](int64_t begin, int64_t end) {
    int64_t first = 0, column = 0;
    for (size_t i = 0; i < weights.size(); i++) {
      const int64_t count = parts_of(outputs[i], group);
      const int64_t from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, count);
      const T* bias = biases[i] ? data<T>(*biases[i]) : nullptr;
      if (from < to)
        multiply(lines, data<T>(weights[i]), bias, data<T>(out) + column, rows, outputs[i], inputs, stride, from, to);
      first += count;
      column += outputs[i];
    }
  });
}

template <class T>
Tensor packed(const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const int64_t size = rounded_up(outputs, group_of(weight)) * rounded_up(inputs, step_of<T>(weight));
  Tensor packed = torch::stable::new_empty(weight, {size});
  if constexpr (std::is_same_v<T, bfloat16>)
    if (tiled(weight)) {
      pack_tiles(data<T>(weight), data<T>(packed), outputs, inputs);
      return packed;
    }
  pack_panels(data<T>(weight), data<T>(packed), outputs, inputs);
  return packed;
}

}  // namespace

Tensor pack_weight(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::BFloat16 ? packed<bfloat16>(weight) : packed<float>(weight);
}

Tensor linear(const Tensor& x, std::vector<Tensor> weights, std::vector<std::optional<Tensor>> biases,
              std::vector<int64_t> outputs) {
  const Tensor rows = torch::stable::contiguous(x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = 0;
  for (int64_t count : outputs) shape.back() += count;
  Tensor out = torch::stable::new_empty(x, shape);
  if (x.scalar_type() == ScalarType::BFloat16)
    multiply_all<bfloat16>(rows, weights, biases, outputs, out);
  else
    multiply_all<float>(rows, weights, biases, outputs, out);
  return out;
}

}  // namespace specgen
