// Attention of one block of rows over one chunk of packed pages: the algebra of attention_kernel.h, with
//   scores[x][c] = scale[c] * sum over d ascending of q[d][x] * level[d][c]
//   acc[x][d]    = sum over visible c ascending of (p[x][c] * scale[c]) * level[c][d]
// Levels are made in registers, 16 at a time, and never stored. The rotation of q and the way back
// are the caller's; both happen once per row and head.
#pragma once

#include "attention_kernel.h"
#include "packed_codecs.h"

namespace dendrite::DENDRITE_ISA {
namespace {

constexpr int kVectors = kGroup / W;  // registers that hold the levels of a group

// What a tile of scores reads: 16 slots of a page, and what to fetch for the next one.
struct ScoreSource {
  const uint8_t* codes;  // [dim] groups
  const uint8_t* scales;  // of the first slot
  int scale_step;         // bytes from one item of the strip to the next
  const uint8_t* ahead;   // codes that come next
};

template <class C, int R>
void packed_score(const float* q, int q_stride, ScoreSource from, int dim, float* out) {
  constexpr int every = C::kBytes >= 64 ? 1 : 64 / C::kBytes;
  const typename C::State state{};
  vf sum[R][kVectors], factor[kVectors] = {};
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < kVectors; ++n) sum[r][n] = splat<vf>(0.0f);
  for (int d = 0; d < dim; ++d, q += q_stride) {
    const uint8_t* group = from.codes + d * C::kBytes;
    if (d % every == 0) __builtin_prefetch(from.ahead + d * C::kBytes);
    if constexpr (C::kScale == Scale::block)
      if (d % 32 == 0)
        for (int n = 0; n < kVectors; ++n)
          factor[n] = scales_at<C>(from.scales + d / 32 * from.scale_step, n * W);
    vf column[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      column[n] = C::decode(group, n, state);
      if constexpr (C::kScale == Scale::block) column[n] *= factor[n];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf query = splat<vf>(q[r]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[r][n] = fma(query, column[n], sum[r][n]);
    }
  }
  if constexpr (C::kScale == Scale::token)
    for (int n = 0; n < kVectors; ++n) factor[n] = scales_at<C>(from.scales, n * W);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      if constexpr (C::kScale == Scale::token) sum[r][n] *= factor[n];
      store(out + r * kScoreStride + n * W, sum[r][n]);
    }
}

// What a tile of values reads: pages of a run, from the group that holds dimension d0 on.
struct ValueSource {
  const uint8_t* const* codes;   // of each page, at that group
  const uint8_t* const* scales;  // of each page, at the first item that is read
  int slot_bytes;                // codes of one slot
  int shift;                     // log2 of the page size
};

// acc[r] += sum over columns [begin, end) of (p[r][c] * scale[c]) * level[c], G groups.
template <class C, int R, int G>
void packed_value(const float* p, ValueSource from, int begin, int end, int dim, float* acc) {
  constexpr int vectors = G * kVectors;
  const typename C::State state{};
  vf sum[R][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < vectors; ++n) sum[r][n] = load<vf>(acc + r * dim + n * W);
  for (int c = begin; c < end; ++c) {
    const int page = c >> from.shift, slot = c - (page << from.shift);
    const uint8_t* codes = from.codes[page] + slot * from.slot_bytes;
    const float scale = scale_at<C>(from.scales[page], slot);
    const float further =  // the next 32 dimensions of a tile of 64
        C::kScale == Scale::block && G > 2 ? scale_at<C>(from.scales[page], slot + (1 << from.shift)) : 0;
    vf value[vectors];
#pragma GCC unroll 8
    for (int n = 0; n < vectors; ++n) {
      value[n] = C::decode(codes + n / kVectors * C::kBytes, n % kVectors, state);
      if constexpr (C::kScale == Scale::block) value[n] *= splat<vf>(n / kVectors < 2 ? scale : further);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float share = p[r * kScoreStride + c];
      const vf weight = splat<vf>(C::kScale == Scale::token ? share * scale : share);
#pragma GCC unroll 8
      for (int n = 0; n < vectors; ++n) sum[r][n] = fma(weight, value[n], sum[r][n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < vectors; ++n) store(acc + r * dim + n * W, sum[r][n]);
}

using PackedScore = void (*)(const float*, int, ScoreSource, int, float*);
using PackedValue = void (*)(const float*, ValueSource, int, int, int, float*);

template <class C, class Scores, class Values>
struct PackedTilesOf;
template <class C, int... S, int... X>
struct PackedTilesOf<C, std::integer_sequence<int, S...>, std::integer_sequence<int, X...>> {
  static constexpr PackedScore score[] = {packed_score<C, S + 1>...};
  static constexpr PackedValue value[] = {packed_value<C, X + 1, 1>...};
#if DENDRITE_LEVEL >= 3
  static constexpr PackedValue wide[] = {packed_value<C, X + 1, 4>...};
#endif
};
template <class C>
using PackedTiles = PackedTilesOf<C, std::make_integer_sequence<int, kScoreRows>,
                                  std::make_integer_sequence<int, kValueRows>>;

template <class C>
void packed_score_page(const ChunkJob& job, const PackedSide& side, int32_t page, int32_t next, int x,
                       int rows, int column) {
  const uint8_t* codes = side.codes_of(page, job.kv_head);
  const uint8_t* scales = side.scales_of(page, job.kv_head);
  const uint8_t* ahead = side.codes_of(next, job.kv_head);
  const int width = kScaleBytes[side.codec];
  for (int c = 0; c < job.page_size; c += kGroup) {
    const int64_t at = int64_t(c) / kGroup * job.dim * C::kBytes;
    const ScoreSource from = {codes + at, scales + c * width, job.page_size * width, ahead + at};
    PackedTiles<C>::score[rows - 1](job.q + x, job.q_stride, from, job.dim,
                                    job.scores + int64_t(x) * kScoreStride + column + c);
  }
}

using ScorePage = void (*)(const ChunkJob&, const PackedSide&, int32_t, int32_t, int, int, int);
constexpr ScorePage kScorePages[kPackedCodecs] = {
    packed_score_page<Fp32Codec>, packed_score_page<Bf16Codec>, packed_score_page<Fp16Codec>,
    packed_score_page<E4m3Codec>, packed_score_page<E5m2Codec>, packed_score_page<Mxfp8Codec>,
    packed_score_page<Tq4Codec>,  packed_score_page<Tq3Codec>,  packed_score_page<Tq2Codec>,
};

void packed_score_run(const ChunkJob& job, const Run& run) {
  const int begin = run.row_begin * job.group, end = run.row_end * job.group;
  const int step = tile_rows(end - begin, kScoreRows);
  for (int i = 0; i < run.num_pages; ++i) {
    const int column = run.column + (i << job.page_shift);
    const int32_t* page = job.pages + run.page_begin + i;
    const int32_t place = job.k_side->first_place(page[0]);
    const PackedSide& side = place < 0 ? *job.k_side : *job.k_side->first;
    const int32_t here = place < 0 ? page[0] : place;
    const int32_t next = place < 0 && i + 1 < run.num_pages ? page[1] : here;
    for (int x = begin; x < end; x += step) {
      const int stop = least(end, x + step);
      if (visible(job, x, stop, column, column + job.page_size))
        kScorePages[side.codec](job, side, here, next, x, stop - x, column);
    }
  }
}

// Pages of a run whose V is read together.
struct ValuePages {
  const uint8_t* codes[kChunk / kGroup];
  const uint8_t* scales[kChunk / kGroup];
};

template <class C>
void packed_value_columns(const ChunkJob& job, const ValuePages& pages, int x, int rows, int column,
                          int begin, int end) {
  if (begin >= end) return;
  const float* p = job.scores + int64_t(x) * kScoreStride + column;
  float* acc = job.acc + int64_t(x) * job.dim;
  const int count = ((end - 1) >> job.page_shift) + 1;
  ValuePages at = pages;
  const ValueSource from = {at.codes, at.scales, job.dim / kGroup * C::kBytes, job.page_shift};
  const auto advance = [&](int groups, int d) {
    for (int i = 0; i < count; ++i) {
      at.codes[i] += groups * C::kBytes;
      if (C::kScale == Scale::block && (d % 32) == 0) at.scales[i] = pages.scales[i] + d / 32 * job.page_size;
    }
  };
  int d = 0;
#if DENDRITE_LEVEL >= 3
  for (; d + 64 <= job.dim; d += 64) {
    PackedTiles<C>::wide[rows - 1](p, from, begin, end, job.dim, acc + d);
    advance(4, d + 64);
  }
#endif
  for (; d < job.dim; d += kGroup) {
    PackedTiles<C>::value[rows - 1](p, from, begin, end, job.dim, acc + d);
    advance(1, d + kGroup);
  }
}

// As value_rows: columns that all rows see run as a tile, the ragged ends row by row.
template <class C>
void packed_value_rows(const ChunkJob& job, const ValuePages& pages, int x, int rows, int c0, int c1) {
  int begin = c0, end = c1;
  for (int r = x; r < x + rows; ++r) {
    begin = most(begin, job.lo[r]);
    end = least(end, job.hi[r]);
  }
  const bool tile = begin < end;
  for (int r = x; r < x + rows; ++r) {
    const int stop = least(job.hi[r], c1);
    packed_value_columns<C>(job, pages, r, 1, c0, most(job.lo[r], c0) - c0, (tile ? begin : stop) - c0);
  }
  if (!tile) return;
  packed_value_columns<C>(job, pages, x, rows, c0, begin - c0, end - c0);
  for (int r = x; r < x + rows; ++r)
    packed_value_columns<C>(job, pages, r, 1, c0, end - c0, least(job.hi[r], c1) - c0);
}

using ValueRows = void (*)(const ChunkJob&, const ValuePages&, int, int, int, int);
constexpr ValueRows kRowsOfValues[kPackedCodecs] = {
    packed_value_rows<Fp32Codec>, packed_value_rows<Bf16Codec>, packed_value_rows<Fp16Codec>,
    packed_value_rows<E4m3Codec>, packed_value_rows<E5m2Codec>, packed_value_rows<Mxfp8Codec>,
    packed_value_rows<Tq4Codec>,  packed_value_rows<Tq3Codec>,  packed_value_rows<Tq2Codec>,
};

// The pages of a run from `i` on that are alike: first pages or not. Returns how many.
int value_stretch(const ChunkJob& job, const Run& run, int i, ValuePages* pages) {
  const PackedSide& v = *job.v_side;
  const int32_t* ids = job.pages + run.page_begin + i;
  const bool is_first = v.first_place(ids[0]) >= 0;
  const PackedSide& side = is_first ? *v.first : v;
  int count = 0;
  for (; i + count < run.num_pages; ++count) {
    const int32_t place = v.first_place(ids[count]);
    if ((place >= 0) != is_first) break;
    const int32_t page = is_first ? place : ids[count];
    pages->codes[count] = side.codes_of(page, job.kv_head);
    pages->scales[count] = side.scales_of(page, job.kv_head);
  }
  return count;
}

void packed_value_run(const ChunkJob& job, const Run& run) {
  const int begin = run.row_begin * job.group, end = run.row_end * job.group;
  const int step = tile_rows(end - begin, kValueRows);
  ValuePages pages;
  for (int i = 0, count; i < run.num_pages; i += count) {
    const bool is_first = job.v_side->first_place(job.pages[run.page_begin + i]) >= 0;
    count = value_stretch(job, run, i, &pages);
    const ValueRows rows = kRowsOfValues[(is_first ? job.v_side->first : job.v_side)->codec];
    const int c0 = run.column + (i << job.page_shift), c1 = c0 + (count << job.page_shift);
    for (int x = begin; x < end; x += step) rows(job, pages, x, least(end, x + step) - x, c0, c1);
  }
}

void attend_packed_chunk(const ChunkJob& job) {
  for (int i = 0; i < job.num_runs; ++i) packed_score_run(job, job.runs[i]);
  for (int x = 0; x < job.num_q; ++x)
    if (job.lo[x] < job.hi[x])
      softmax_row(job.scores + int64_t(x) * kScoreStride, job.lo[x], job.hi[x], job.m + x, job.l + x);
  __builtin_memset(job.acc, 0, sizeof(float) * job.num_q * job.dim);
  for (int i = 0; i < job.num_runs; ++i) packed_value_run(job, job.runs[i]);
}

}  // namespace
}  // namespace dendrite::DENDRITE_ISA
