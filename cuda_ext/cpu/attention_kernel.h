// Attention of one block of rows over one chunk of positions (see kernels.h for the index algebra).
//
//   scores[x][c] = sum over d ascending of q[d][x] * k[d][c]          (score_tile)
//   m[x] = max over visible c;  p = exp(score - m);  l[x] = sum p     (softmax_row)
//   acc[x][d]    = sum over visible c ascending of p[x][c] * v[c][d]  (value_tile)
//
// Every element is one chain of multiply-adds in a fixed order, so a row's result does not depend on
// which rows share its tile, on where nodes are cut, nor on the page list. A row reads exactly its
// visible columns: slots that are empty or belong to later tokens may hold NaN.
#pragma once

#include <utility>

#include "kernels.h"
#include "simd.h"

namespace dendrite::DENDRITE_ISA {
namespace {

#if DENDRITE_LEVEL >= 3
constexpr int kScoreRows = 12, kValueRows = 6;
#elif DENDRITE_LEVEL >= 1
constexpr int kScoreRows = 6, kValueRows = 6;
#else
constexpr int kScoreRows = 2, kValueRows = 2;
#endif

// Where the data needed next lie, laid out like the K page being read: fetched a line per step.
struct Ahead {
  const float* k;  // the next page of K
  const float* v;  // V of this page
};

// R q-rows x (NV vectors) of scores for one page; all accumulators stay in registers.
template <class V, int R, int NV>
void score_tile(const float* q, int q_stride, const float* k, int page_size, int dim, Ahead ahead,
                float* out) {
  constexpr int width = sizeof(V) / sizeof(float);
  V sum[R][NV];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < NV; ++n) sum[r][n] = splat<V>(0.0f);
  for (int d = 0; d < dim; ++d, q += q_stride, k += page_size) {
    __builtin_prefetch(ahead.k + d * page_size);
    __builtin_prefetch(ahead.v + d * page_size, 0, 2);
    V column[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) column[n] = load<V>(k + n * width);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V query = splat<V>(q[r]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) sum[r][n] = fma(query, column[n], sum[r][n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) store(out + r * kScoreStride + n * width, sum[r][n]);
}

// acc[r] += sum over columns [begin, end) of p[r][c] * v[c], NV vectors of the head dimension.
template <class V, int R, int NV>
void value_tile(const float* p, const float* const* pages, int begin, int end, int shift, int dim,
                int d0, float* acc) {
  constexpr int width = sizeof(V) / sizeof(float);
  V sum[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) sum[r][n] = load<V>(acc + r * dim + d0 + n * width);
  for (int c = begin; c < end;) {
    const int page = c >> shift;
    const int stop = least(end, (page + 1) << shift);
    const float* v = pages[page] + (c - (page << shift)) * dim + d0;
    for (; c < stop; ++c, v += dim) {
      V value[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) value[n] = load<V>(v + n * width);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const V weight = splat<V>(p[r * kScoreStride + c]);
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) sum[r][n] = fma(weight, value[n], sum[r][n]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) store(acc + r * dim + d0 + n * width, sum[r][n]);
}

using ScoreTile = void (*)(const float*, int, const float*, int, int, Ahead, float*);
using ValueTile = void (*)(const float*, const float* const*, int, int, int, int, int, float*);

template <class V, int NV, int Rows, class = std::make_integer_sequence<int, Rows>>
struct Tiles;
template <class V, int NV, int Rows, int... I>
struct Tiles<V, NV, Rows, std::integer_sequence<int, I...>> {
  static constexpr ScoreTile score[Rows] = {score_tile<V, I + 1, NV>...};
  static constexpr ValueTile value[Rows] = {value_tile<V, I + 1, NV>...};
};

#if DENDRITE_LEVEL >= 3
using Score16 = Tiles<f16, 1, kScoreRows>;
using Score8 = Tiles<f8, 1, kScoreRows>;
using Value64 = Tiles<f16, 4, kValueRows>;
using Value16 = Tiles<f16, 1, kValueRows>;
using Value8 = Tiles<f8, 1, kValueRows>;
#elif DENDRITE_LEVEL == 2
using Score16 = Tiles<f8, 2, kScoreRows>;
using Score8 = Tiles<f8, 1, kScoreRows>;
using Value16 = Tiles<f8, 2, kValueRows>;
using Value8 = Tiles<f8, 1, kValueRows>;
#else
using Score16 = Tiles<f4, 4, kScoreRows>;
using Score8 = Tiles<f4, 2, kScoreRows>;
using Value16 = Tiles<f4, 4, kValueRows>;
using Value8 = Tiles<f4, 2, kValueRows>;
#endif

// Pages of fewer than 8 slots: rare, plain loops in the same order.
void score_narrow(const float* q, int q_stride, const float* k, int page_size, int dim, int rows,
                  float* out) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < page_size; ++c) {
      f4 sum = splat<f4>(0.0f);
      for (int d = 0; d < dim; ++d)
        sum = fma(splat<f4>(q[d * q_stride + r]), splat<f4>(k[d * page_size + c]), sum);
      out[r * kScoreStride + c] = sum[0];
    }
}

void score_page(const ChunkJob& job, const float* k, Ahead ahead, int x, int rows, int column) {
  const float* q = job.q + x;
  float* out = job.scores + int64_t(x) * kScoreStride + column;
  const int size = job.page_size;
  if (size >= 16) {
    for (int c = 0; c < size; c += 16)
      Score16::score[rows - 1](q, job.q_stride, k + c, size, job.dim, {ahead.k + c, ahead.v + c},
                               out + c);
  } else if (size == 8) {
    Score8::score[rows - 1](q, job.q_stride, k, size, job.dim, ahead, out);
  } else {
    score_narrow(q, job.q_stride, k, size, job.dim, rows, out);
  }
}

// Balanced tile height for n rows: 13 rows make 7 + 6, not 12 + 1.
DENDRITE_INLINE int tile_rows(int n, int most_rows) {
  const int tiles = (n + most_rows - 1) / most_rows;
  return (n + tiles - 1) / tiles;
}

// Does any q-row of [x, end) see a column of [c0, c1)?
DENDRITE_INLINE bool visible(const ChunkJob& job, int x, int end, int c0, int c1) {
  for (; x < end; ++x)
    if (most(job.lo[x], c0) < least(job.hi[x], c1)) return true;
  return false;
}

void score_run(const ChunkJob& job, const Run& run) {
  const int begin = run.row_begin * job.group, end = run.row_end * job.group;
  const int step = tile_rows(end - begin, kScoreRows);
  int first = 0, last = kChunk;  // columns that every row of the run sees
  for (int x = begin; x < end; ++x) {
    first = most(first, job.lo[x]);
    last = least(last, job.hi[x]);
  }
  for (int i = 0; i < run.num_pages; ++i) {
    const int column = run.column + (i << job.page_shift);
    const int32_t* page = job.pages + run.page_begin + i;
    const float* k = job.k + page[0] * job.page_stride;
    const int next = i + 1 < run.num_pages ? page[1] : page[0];
    const Ahead ahead = {job.k + next * job.page_stride, job.v + page[0] * job.page_stride};
    for (int x = begin; x < end; x += step) {
      const int stop = least(end, x + step);
      if ((column >= first && column + job.page_size <= last) ||
          visible(job, x, stop, column, column + job.page_size))
        score_page(job, k, ahead, x, stop - x, column);
    }
  }
}

// Scores of one row -> exp(score - m) in place; columns outside [lo, hi) up to the next multiple of
// 16 become 0 so that whole vectors can be used.
void softmax_row(float* s, int lo, int hi, float* m_out, float* l_out) {
  const float minus_inf = -__builtin_inff();
  const int begin = lo & ~15, end = (hi + 15) & ~15;
  for (int c = begin; c < lo; ++c) s[c] = minus_inf;
  for (int c = hi; c < end; ++c) s[c] = minus_inf;
  vf best = splat<vf>(minus_inf);
  for (int c = begin; c < end; c += W) {
    const vf v = load<vf>(s + c);
    best = v > best ? v : best;
  }
  const float m = max_lanes(best);
  const vf shift = splat<vf>(m);
  vf sum = splat<vf>(0.0f);
  for (int c = begin; c < end; c += W) {
    const vf e = exp_lanes(load<vf>(s + c) - shift);
    store(s + c, e);
    sum += e;
  }
  *m_out = m;
  *l_out = sum_lanes(sum);
}

void value_columns(const ChunkJob& job, const float* const* pages, int x, int rows, int column,
                   int begin, int end) {
  if (begin >= end) return;
  const float* p = job.scores + int64_t(x) * kScoreStride + column;
  float* acc = job.acc + int64_t(x) * job.dim;
  int d = 0;
#if DENDRITE_LEVEL >= 3
  for (; d + 64 <= job.dim; d += 64)
    Value64::value[rows - 1](p, pages, begin, end, job.page_shift, job.dim, d, acc);
#endif
  for (; d + 16 <= job.dim; d += 16)
    Value16::value[rows - 1](p, pages, begin, end, job.page_shift, job.dim, d, acc);
  if (d < job.dim)
    Value8::value[rows - 1](p, pages, begin, end, job.page_shift, job.dim, d, acc);
}

// One tile of rows over the columns [c0, c1) of a few pages. Columns that all rows see run as a tile;
// the ragged ends run row by row, in the same ascending order.
void value_rows(const ChunkJob& job, const float* const* pages, int x, int rows, int c0, int c1) {
  int begin = c0, end = c1;
  for (int r = x; r < x + rows; ++r) {
    begin = most(begin, job.lo[r]);
    end = least(end, job.hi[r]);
  }
  const bool tile = begin < end;
  for (int r = x; r < x + rows; ++r) {
    const int stop = least(job.hi[r], c1);
    value_columns(job, pages, r, 1, c0, most(job.lo[r], c0) - c0, (tile ? begin : stop) - c0);
  }
  if (!tile) return;
  value_columns(job, pages, x, rows, c0, begin - c0, end - c0);
  for (int r = x; r < x + rows; ++r)
    value_columns(job, pages, r, 1, c0, end - c0, least(job.hi[r], c1) - c0);
}

void value_run(const ChunkJob& job, const Run& run) {
  const int begin = run.row_begin * job.group, end = run.row_end * job.group;
  const int step = tile_rows(end - begin, kValueRows);
  const int batch = most(1, 64 >> job.page_shift);  // pages whose V stays in the first-level cache
  const float* pages[64];
  for (int i = 0; i < run.num_pages; i += batch) {
    const int count = least(batch, run.num_pages - i);
    for (int j = 0; j < count; ++j)
      pages[j] = job.v + job.pages[run.page_begin + i + j] * job.page_stride;
    const int c0 = run.column + (i << job.page_shift);
    const int c1 = c0 + (count << job.page_shift);
    for (int x = begin; x < end; x += step)
      value_rows(job, pages, x, least(end, x + step) - x, c0, c1);
  }
}

void attend_chunk(const ChunkJob& job) {
  for (int i = 0; i < job.num_runs; ++i) score_run(job, job.runs[i]);
  for (int x = 0; x < job.num_q; ++x)
    if (job.lo[x] < job.hi[x])
      softmax_row(job.scores + int64_t(x) * kScoreStride, job.lo[x], job.hi[x], job.m + x, job.l + x);
  __builtin_memset(job.acc, 0, sizeof(float) * job.num_q * job.dim);
  for (int i = 0; i < job.num_runs; ++i) value_run(job, job.runs[i]);
}

void merge_state(float* acc, float* m, float* l, const float* acc_c, float m_c, float l_c, int dim) {
  const float top = m_c > *m ? m_c : *m;
  const float a = exp_one(*m - top), b = exp_one(m_c - top);
  *m = top;
  *l = *l * a + l_c * b;
  for (int d = 0; d < dim; ++d) acc[d] = acc[d] * a + acc_c[d] * b;
}

void finish_row(const float* acc, float l, float* out, int dim) {
  const float inverse = 1.0f / l;
  for (int d = 0; d < dim; ++d) out[d] = acc[d] * inverse;
}

}  // namespace
}  // namespace dendrite::DENDRITE_ISA
