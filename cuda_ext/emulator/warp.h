// Warp collectives and tensor cores: all 32 lanes meet, the last to come computes for all.
#pragma once

#include "block.h"
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
  machine.rendezvous(wait, sizeof(T), &own, [&](void** all) {
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
  machine.rendezvous(wait, 0, &own, [](void** all) {
    uint32_t mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<Exchange<uint32_t>*>(all[i])->value << i;
    for (int i = 0; i < 32; ++i) static_cast<Exchange<uint32_t>*>(all[i])->result = mask;
  });
  return own.result;
}

struct MatrixLoad {
  uint32_t* registers;
  const uint16_t* row;
};

template <int N, bool Trans>
inline void ldmatrix(Wait wait, uint32_t (&r)[N], const void* smem) {
  const Fiber& self = machine.current();
  const char* row = static_cast<const char*>(smem);
  if (self.lane < N * 8) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
      machine.fail(std::string(name_of(wait)) + ": the address of a row is no multiple of 16");
    if (!machine.is_shared(row) || !machine.is_shared(row + 15))
      machine.fail(std::string(name_of(wait)) + ": row at byte " +
                   std::to_string(row - machine.shared_memory()) + " of shared memory of " +
                   std::to_string(machine.shared_bytes()) + " bytes");
  }
  MatrixLoad own{r, reinterpret_cast<const uint16_t*>(row)};
  machine.rendezvous(wait, 0, &own, [](void** all) {
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

template <class T>
inline void multiply(void** all) {
  typedef float Four __attribute__((vector_size(16)));
  float a[16][16];
  Four b[16][2], d[16][2];
  const auto put = [](float* lo, float* hi, uint32_t packed) {
    const float2 pair = unpack2<T>(packed);
    *lo = pair.x;
    *hi = pair.y;
  };
  const auto column = [](Four* row, int n) { return reinterpret_cast<float*>(row) + n; };
  for (int lane = 0; lane < 32; ++lane) {
    const Product& own = *static_cast<Product*>(all[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* at = &a[g + i % 2 * 8][t + i / 2 * 8];
      put(at, at + 1, own.a[i]);
    }
    for (int i = 0; i < 2; ++i)
      put(column(b[t + i * 8], g), column(b[t + i * 8 + 1], g), own.b[i]);
    for (int i = 0; i < 4; ++i) *column(d[g + i / 2 * 8], t + i % 2) = own.d[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) {
      const Four scale = {a[m][k], a[m][k], a[m][k], a[m][k]};
      d[m][0] += scale * b[k][0];
      d[m][1] += scale * b[k][1];
    }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& own = *static_cast<Product*>(all[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) own.d[i] = *column(d[g + i / 2 * 8], t + i % 2);
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
inline void sync_warp() {
  emulator::machine.rendezvous(emulator::Wait::kSyncWarp, 0, nullptr, [](void**) {});
}
inline void sync_block() { emulator::machine.sync_block(); }

inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem) {
  emulator::ldmatrix<4, false>(emulator::Wait::kLdmatrixX4, r, smem);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem) {
  emulator::ldmatrix<2, false>(emulator::Wait::kLdmatrixX2, r, smem);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* smem) {
  emulator::ldmatrix<4, true>(emulator::Wait::kLdmatrixX4Trans, r, smem);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* smem) {
  emulator::ldmatrix<2, true>(emulator::Wait::kLdmatrixX2Trans, r, smem);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2, "tensor cores take bf16 and half_t");
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  emulator::Product own{d, a, b};
  emulator::machine.rendezvous(kBf16 ? emulator::Wait::kMmaBf16 : emulator::Wait::kMmaF16, 0, &own,
                               [](void** all) { emulator::multiply<T>(all); });
}

}  // namespace dendrite
