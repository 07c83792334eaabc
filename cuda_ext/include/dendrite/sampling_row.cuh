// One row of logits as sampling sees it: bias, penalties and bitmask touch few tokens or hide them,
// so they are never written anywhere. A bitmap in shared memory says which tokens are taken from
// the row as they are; the tokens with a bias or a penalty follow from their lists.
#pragma once

#include "sampling_types.cuh"

namespace dendrite::sampling {

// Bias and penalties of one row: lists sorted by id. Entries of both lists, and the token of the
// step before, are numbered 0 .. size() - 1.
struct Edits {
  const float* logits;
  const int *bias_ids, *pen_ids, *pen_counts, *mask;
  const float* bias_values;
  int biases, pens, previous, vocab;
  float repetition, presence, frequency;

  DENDRITE_DEVICE int size() const { return biases + pens + (previous >= 0 ? 1 : 0); }

  // First entry that is not below `id`.
  DENDRITE_DEVICE static int lower_bound(const int* ids, int n, int id) {
    int lo = 0;
    while (lo < n) {
      const int mid = (lo + n) / 2;
      if (ids[mid] < id)
        lo = mid + 1;
      else
        n = mid;
    }
    return lo;
  }
  DENDRITE_DEVICE static bool contains(const int* ids, int n, int id) {
    const int at = lower_bound(ids, n, id);
    return at < n && ids[at] == id;
  }

  // The token of entry i; -1 where another entry stands for it or the bitmask bans it.
  DENDRITE_DEVICE int id_at(int i) const {
    int id;
    if (i < biases) {
      id = bias_ids[i];
      if (i > 0 && bias_ids[i - 1] == id) return -1;
    } else {
      const int pen = i - biases;
      id = pen < pens ? pen_ids[pen] : previous;
      if (pen < pens ? pen > 0 && pen_ids[pen - 1] == id : contains(pen_ids, pens, id)) return -1;
      if (biases > 0 && contains(bias_ids, biases, id)) return -1;
    }
    if (uint32_t(id) >= uint32_t(vocab)) return -1;
    if (mask != nullptr && (uint32_t(mask[id >> 5]) >> (id & 31) & 1u) == 0) return -1;
    return id;
  }

  // The processed logit of a token of some entry. Products are rounded before they are added: in
  // double they are exact, and no compiler may fuse the two.
  DENDRITE_DEVICE float value_at(int id) const {
    float x = logits[id];
    for (int i = lower_bound(bias_ids, biases, id); i < biases && bias_ids[i] == id; ++i)
      x += bias_values[i];
    const int at = lower_bound(pen_ids, pens, id);
    const bool listed = at < pens && pen_ids[at] == id;
    if (!listed && id != previous) return x;
    const int count = (listed ? pen_counts[at] : 0) + (id == previous ? 1 : 0);
    x = x > 0.0f ? x / repetition : float(double(x) * double(repetition));
    const float often = float(double(frequency) * double(float(count)));
    return x - ((count > 0 ? presence : 0.0f) + often);
  }
};

struct Row {
  const float* logits;
  const int* params;
  const Record* record;
  int vocab, previous;
  int begin, end;  // tokens that this block looks at; begin is a multiple of kTile
  bool edited;     // some tokens are not as in `logits`; then `bitmap` starts at token `begin`
  uint32_t* bitmap;

  DENDRITE_DEVICE const Header& header() const {
    return *reinterpret_cast<const Header*>(params);
  }
  DENDRITE_DEVICE const int* mask() const {
    if (record->mask_row < 0) return nullptr;
    return params + header().mask + size_t(record->mask_row) * header().words;
  }
  DENDRITE_DEVICE Edits edits() const {
    const Header& h = header();
    const Record& r = *record;
    return {logits,
            params + h.bias_ids + r.bias_begin,
            params + h.pen_ids + r.pen_begin,
            params + h.pen_counts + r.pen_begin,
            mask(),
            reinterpret_cast<const float*>(params + h.bias_values + r.bias_begin),
            r.bias_end - r.bias_begin,
            r.pen_end - r.pen_begin,
            previous,
            vocab,
            r.repetition,
            r.presence,
            r.frequency};
  }
  DENDRITE_DEVICE bool plain(int id) const {
    const int at = id - begin;
    return (bitmap[at >> 5] >> (at & 31) & 1u) != 0;
  }
};

// Which tokens of [begin, end) are taken from the row as they are. Ends with a barrier.
DENDRITE_DEVICE void make_bitmap(const Row& row) {
  const int words = (row.end - row.begin + 31) / 32;
  const int* mask = row.mask();
  for (int i = threadIdx.x; i < words; i += blockDim.x)
    row.bitmap[i] = mask == nullptr ? 0xffffffffu : uint32_t(mask[row.begin / 32 + i]);
  sync_block();
  const Edits edits = row.edits();
  for (int i = threadIdx.x; i < edits.size(); i += blockDim.x) {
    const int id = edits.id_at(i);
    if (id < row.begin || id >= row.end) continue;
    const int at = id - row.begin;  // the bit is set, and this is the only entry of its token
    atomic_add(reinterpret_cast<int*>(&row.bitmap[at >> 5]), int(0u - (1u << (at & 31))));
  }
  sync_block();
}

// Calls function(processed logit, id) for every token of [begin, end) with a bias or penalty.
template <class Function>
DENDRITE_DEVICE void for_each_edit(const Row& row, Function&& function) {
  const Edits edits = row.edits();
  for (int i = threadIdx.x; i < edits.size(); i += blockDim.x) {
    const int id = edits.id_at(i);
    if (id >= row.begin && id < row.end) function(edits.value_at(id), id);
  }
}

// Four consecutive tokens from `id` on; bit c of `mask`: x[c] is the processed logit of id + c.
struct Four {
  float x[4];
  uint32_t mask;
  int id;

  DENDRITE_DEVICE float pick(int c) const {
    return c == 0 ? x[0] : c == 1 ? x[1] : c == 2 ? x[2] : x[3];
  }
};

// The 16 bytes of a row that hold four of its tokens.
template <bool kEdited>
DENDRITE_DEVICE Four whole_four(const Row& row, uint4 data, int id) {
  uint32_t mask = 15u;
  if (kEdited && row.edited) {
    const int at = id - row.begin, bit = at & 31;
    mask = row.bitmap[at >> 5] >> bit;
    if (bit > 28) mask |= row.bitmap[(at >> 5) + 1] << (32 - bit);
    mask &= 15u;
  }
  return {
      {bits_float(data.x), bits_float(data.y), bits_float(data.z), bits_float(data.w)}, mask, id};
}

// The same where some of the four lie outside of [begin, end).
template <bool kEdited>
DENDRITE_DEVICE Four partial_four(const Row& row, int id) {
  Four four{{}, 0, id};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (id + c < row.begin || id + c >= row.end) continue;
    four.x[c] = row.logits[id + c];
    if (!kEdited || !row.edited || row.plain(id + c)) four.mask |= 1u << c;
  }
  return four;
}

// Calls visit(Four) so that every token of [begin, end) that is taken from the row as it is comes
// once, and group() after at most kUnroll calls of a thread. Without kEdited the row must not be.
template <bool kEdited, int kUnroll, class Visit, class Group>
DENDRITE_DEVICE void for_each_four(const Row& row, Visit&& visit, Group&& group) {
  const int n = row.end - row.begin, threads = blockDim.x, thread = threadIdx.x;
  if (n <= 0) return;
  // Vector i holds tokens start + 4 i and the next three; those of [first, last) lie in the row.
  const int before = int(reinterpret_cast<uintptr_t>(row.logits + row.begin) / 4 % 4);
  const int start = row.begin - before, first = before > 0 ? 1 : 0, last = (before + n) / 4;
  const float* x = row.logits + start;
  int vector = first + thread;
  for (; kUnroll > 1 && vector + (kUnroll - 1) * threads < last; vector += kUnroll * threads) {
    uint4 data[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) data[u] = load_global_16(x + 4 * (vector + u * threads));
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      visit(whole_four<kEdited>(row, data[u], start + 4 * (vector + u * threads)));
    group();
  }
  for (; vector < last; vector += threads) {
    visit(whole_four<kEdited>(row, load_global_16(x + 4 * vector), start + 4 * vector));
    group();
  }
  // What is left: a first and a last vector, which can be the same.
  const bool is_partial = thread == 0 ? before > 0 : (before + n) % 4 > 0 && last >= first;
  if (thread < 2 && is_partial) {
    visit(partial_four<kEdited>(row, start + 4 * (thread == 0 ? 0 : last)));
    group();
  }
}

// Calls function(processed logit, id) for every token of [begin, end) that is not banned, and
// group() after at most 4 kUnroll such calls of a thread.
template <bool kEdited, int kUnroll, class Function, class Group>
DENDRITE_DEVICE void for_each_token(const Row& row, Function&& function, Group&& group) {
  for_each_four<kEdited, kUnroll>(
      row,
      [&](const Four& four) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          if (four.mask >> c & 1u) function(four.x[c], four.id + c);
      },
      group);
  if (!kEdited || !row.edited) return;
  for_each_edit(row, [&](float value, int id) {
    if (value > -kInfinity) function(value, id);
    group();
  });
}

}  // namespace dendrite::sampling
