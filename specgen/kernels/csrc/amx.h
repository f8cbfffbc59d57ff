// AMX: products of 16 x 32 bfloat16 tiles, summed in float32.
#pragma once

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace specgen {

// Tiles 0-3 sum, 4 and 5 hold rows of the left side, 6 and 7 columns of the right one.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // Rows of the upper pair of sums and of the lower one.
  TileShapes(int upper, int lower) {
    const int count[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int tile = 0; tile < 8; tile++) rows[tile] = count[tile], bytes[tile] = count[tile] ? 64 : 0;
  }
};

// Others release the tiles of a thread as they like, so whoever uses them sets them up first.
inline void set_tiles(int upper, int lower) {
  TileShapes shapes(upper, lower);
  // GCC believes that only the first bytes are read, and may leave the others unwritten.
  asm volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

// Linux hands tiles to a process that asks for them.
inline bool tiles_allowed() {
  constexpr int request_permission = 0x1023, tile_data = 18;
  static const bool allowed = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return allowed;
}

}  // namespace specgen
#else
namespace specgen {
inline bool tiles_allowed() { return false; }
}  // namespace specgen
#endif
