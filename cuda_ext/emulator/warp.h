// Warp collectives and tensor cores: all 32 lanes meet, the last to come computes for all.
#pragma once

#include <string>
#include <type_traits>

#include "machine.h"
#include "numbers.h"

namespace dendrite {
namespace emulator {

template <class T>
struct Exchange {
  T value;
  T result;
  int selector;  // lane, mask or distance
};

// result of lane i = value of lane source(i, its selector), or its own where that is no lane.
template <class T, class Source>
inline T exchange(Wait wait, T value, int selector, Source source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move values of 4 or 8 bytes");
  Exchange<T> own{value, value, selector};
  machine.meet_warp({wait, uint32_t(sizeof(T))}, &own, [&](void** all) {
    for (int i = 0; i < 32; ++i) {
      Exchange<T>& mine = *static_cast<Exchange<T>*>(all[i]);
      const int from = source(i, mine.selector);
      mine.result = static_cast<Exchange<T>*>(all[from >= 0 && from < 32 ? from : i])->value;
    }
  });
  return own.result;
}

inline uint32_t votes(Wait wait, bool pred) {
  Exchange<uint32_t> own{pred, 0, 0};
  machine.meet_warp({wait}, &own, [](void** all) {
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<Exchange<uint32_t>*>(all[i])->value << i;
    for (int i = 0; i < 32; ++i) static_cast<Exchange<uint32_t>*>(all[i])->result = mask;
  });
  return own.result;
}

struct MatrixLoad {
  uint32_t* registers;
  const char* row;
};

inline void check_row(const Meeting& meeting, const char* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    machine.fail(describe(meeting) + ": the address of a row is no multiple of 16");
  if (!machine.is_shared(row, 16))
    machine.fail(describe(meeting) + ": row at byte " +
                 std::to_string(row - machine.shared_memory()) + " of shared memory, which has " +
                 std::to_string(machine.shared_bytes()) + " bytes");
}

template <int N, bool Trans>
inline void ldmatrix(Wait wait, Place place, uint32_t (&r)[N], const void* smem) {
  const Meeting meeting{wait, 0, place};
  const char* row = static_cast<const char*>(smem);
  if (machine.current().lane < N * 8) check_row(meeting, row);
  MatrixLoad own{r, row};
  machine.meet_warp(meeting, &own, [](void** all) {
    for (int m = 0; m < N; ++m) {
      uint16_t matrix[8][8];
      for (int i = 0; i < 8; ++i)
        std::memcpy(matrix[i], static_cast<MatrixLoad*>(all[m * 8 + i])->row, 16);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t lo = Trans ? matrix[t][g] : matrix[g][t];
        const uint32_t hi = Trans ? matrix[t + 1][g] : matrix[g][t + 1];
        static_cast<MatrixLoad*>(all[lane])->registers[m] = lo | hi << 16;
      }
    }
  });
}

struct Product {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Products are summed in fp32 in the order of k, and added to d.
template <class T>
inline void multiply(void** all) {
  typedef float Four __attribute__((vector_size(16)));
  float a[16][16];
  alignas(16) float b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& own = *static_cast<Product*>(all[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(own.a[i]);
      std::memcpy(&a[g + i % 2 * 8][t + i / 2 * 8], &pair, sizeof pair);
    }
    for (int i = 0; i < 2; ++i) {
      const float2 pair = unpack2<T>(own.b[i]);
      b[t + i * 8][g] = pair.x;
      b[t + i * 8 + 1][g] = pair.y;
    }
  }
  for (int m = 0; m < 16; m += 2) {
    Four sum[4] = {};
    for (int k = 0; k < 16; ++k) {
      Four low, high;
      std::memcpy(&low, b[k], 16);
      std::memcpy(&high, b[k] + 4, 16);
      sum[0] += a[m][k] * low;
      sum[1] += a[m][k] * high;
      sum[2] += a[m + 1][k] * low;
      sum[3] += a[m + 1][k] * high;
    }
    std::memcpy(d[m], sum, sizeof sum);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& own = *static_cast<Product*>(all[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) own.d[i] += d[g + i / 2 * 8][t + i % 2];
  }
}

}  // namespace emulator

template <class T>
inline T shfl_xor(T value, int mask) {
  return emulator::exchange(emulator::Wait::kShflXor, value, mask,
                            [](int lane, int m) { return lane ^ m; });
}
template <class T>
inline T shfl(T value, int lane) {
  return emulator::exchange(emulator::Wait::kShfl, value, lane,
                            [](int, int from) { return from & 31; });
}
template <class T>
inline T shfl_up(T value, unsigned delta) {
  return emulator::exchange(emulator::Wait::kShflUp, value, int(delta),
                            [](int lane, int d) { return lane - d; });
}
template <class T>
inline T shfl_down(T value, unsigned delta) {
  return emulator::exchange(emulator::Wait::kShflDown, value, int(delta),
                            [](int lane, int d) { return lane + d; });
}
inline uint32_t ballot(bool pred) { return emulator::votes(emulator::Wait::kBallot, pred); }
inline bool any_sync(bool pred) { return emulator::votes(emulator::Wait::kAny, pred) != 0; }
inline bool all_sync(bool pred) {
  return emulator::votes(emulator::Wait::kAll, pred) == emulator::kEveryLane;
}
inline void sync_warp(emulator::Place place = emulator::Place::here()) {
  emulator::machine.meet_warp({emulator::Wait::kSyncWarp, 0, place}, nullptr, [](void**) {});
}
inline void sync_block(emulator::Place place = emulator::Place::here()) {
  emulator::machine.meet_block({emulator::Wait::kSyncBlock, 0, place});
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem,
                        emulator::Place place = emulator::Place::here()) {
  emulator::ldmatrix<4, false>(emulator::Wait::kLdmatrixX4, place, r, smem);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem,
                        emulator::Place place = emulator::Place::here()) {
  emulator::ldmatrix<2, false>(emulator::Wait::kLdmatrixX2, place, r, smem);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem,
                              emulator::Place place = emulator::Place::here()) {
  emulator::ldmatrix<4, true>(emulator::Wait::kLdmatrixX4Trans, place, r, smem);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem,
                              emulator::Place place = emulator::Place::here()) {
  emulator::ldmatrix<2, true>(emulator::Wait::kLdmatrixX2Trans, place, r, smem);
}

inline uint32_t transpose_8x8(uint32_t row, emulator::Place place = emulator::Place::here()) {
  using Word = emulator::Exchange<uint32_t>;
  Word own{row, row, 0};
  emulator::machine.meet_warp({emulator::Wait::kTranspose, 0, place}, &own, [](void** all) {
    const auto element = [&](int i, int j) {
      return static_cast<Word*>(all[4 * i + j / 2])->value >> (16 * (j % 2)) & 0xffffu;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      static_cast<Word*>(all[lane])->result = element(t, g) | element(t + 1, g) << 16;
    }
  });
  return own.result;
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         emulator::Place place = emulator::Place::here()) {
  static_assert(sizeof(T) == 2, "tensor cores take bf16 and half_t");
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  constexpr emulator::Wait kWait = kBf16 ? emulator::Wait::kMmaBf16 : emulator::Wait::kMmaF16;
  emulator::Product own{d, a, b};
  emulator::machine.meet_warp({kWait, 0, place}, &own,
                              [](void** all) { emulator::multiply<T>(all); });
}

}  // namespace dendrite
