// Packs of sequences in tiles of 16 rows, and products of tiles on tensor cores, for temporal_attention.cuh.
//
// Loads are 16 bytes and go to registers directly, without shared memory. In a span of 32 columns lane 4g + t takes
// columns 8t .. 8t+7 of rows g and g+8. Where the columns are summed over (q k^T, dO v^T) their order is free, so these
// registers are fragments without conversion, if both factors use the same order. Where the rows are summed over
// (P v, dS k, P^T dO, dS^T q) register j of all lanes is an 8 x 8 matrix, transposed in registers, whose column 2t + i
// stands for column 8t + 2j + i: the results of lane t over j are 8 neighbouring columns again, one 16-byte store.
#pragma once

#include "warp.cuh"

namespace bt {

constexpr int kTemporalWarps = 4;  // warps of a block
constexpr int kTemporalThreads = 32 * kTemporalWarps;
constexpr int kTile = 16;
constexpr int kSpan = 32;
constexpr int kMostSlots = 64;
constexpr int kMostWidth = 128;

// Counts fit 32 bits (the launcher checks): rows, sequences times heads.
template <typename T>
struct TemporalDevice {
  const T* qkv;
  const T* grad;       // null in the forward pass
  int slots, heads, width;
  int row_count;       // B * N
  int tokens;          // N
  int pack_rows;       // rows of a pack, whole sequences
  int groups;          // packs * heads
  float scale;
  // Strides in elements, multiples of 8, as the starts are of 16 bytes.
  int64_t qkv_batch, qkv_row, qkv_part, qkv_head, grad_batch, grad_row, grad_head;
};

// Rows g and g+8 of a tile, the lane's 8 columns of a span; pairs of neighbouring columns.
struct Span {
  uint32_t low[4], high[4];
};

struct Lane {
  int g, t;
  __device__ Lane() : g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {}
};

// The rows and the head that a group processes.
template <typename T, int KT>
struct Pack {
  const TemporalDevice<T>& a;
  int head, first, rows;  // rows first .. first + rows - 1 of all B * N; rows is 0 if the group has no pack
  int video, place;       // of the first row

  __device__ Pack(const TemporalDevice<T>& a_in) : a(a_in) {
    const int group = blockIdx.x * (kTemporalWarps / KT) + threadIdx.x / (32 * KT);
    const int pack = group / a.heads;
    head = group - pack * a.heads;
    first = pack * a.pack_rows;
    rows = group < a.groups ? min(a.pack_rows, a.row_count - first) : 0;
    video = first / a.tokens;
    place = first - video * a.tokens;
  }
  // Offset of local row r. The sequences of a pack may belong to two or more videos.
  __device__ int64_t offset(int r, int64_t batch, int64_t row) const {
    int b = video, n = place + r;
    if (n >= a.tokens) {
      b += n / a.tokens;
      n %= a.tokens;
    }
    return b * batch + n * row;
  }
};

// The lane's two rows of a tile in one tensor; null if the row is not in the pack.
template <typename T>
struct TilePointers {
  const T* low;
  const T* high;

  TilePointers() = default;
  template <int KT>
  __device__ TilePointers(const Pack<T, KT>& pack, const T* data, int tile, Lane lane, int64_t batch, int64_t row) {
    const int r = tile * kTile + lane.g;
    low = r < pack.rows ? data + pack.offset(r, batch, row) : nullptr;
    high = r + 8 < pack.rows ? data + pack.offset(r + 8, batch, row) : nullptr;
  }
  // `shift` is from the tensor's start to the part (q, k or v) and head.
  __device__ __forceinline__ Span read(int64_t shift, int span, Lane lane, int width) const {
    const int column = span * kSpan + 8 * lane.t;
    Span to;
    read_row(low, shift + column, column < width, to.low);
    read_row(high, shift + column, column < width, to.high);
    return to;
  }
  static __device__ __forceinline__ void read_row(const T* row, int64_t at, bool inside, uint32_t (&to)[4]) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (row && inside) {
      check_aligned(row + at, 16);
      v = *reinterpret_cast<const uint4*>(row + at);
    }
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
};

// The lane's rows of every tile of the pack.
template <typename T, int KT>
__device__ __forceinline__ void all_tiles(const Pack<T, KT>& pack, const T* data, Lane lane, int64_t batch, int64_t row,
                                          TilePointers<T> (&to)[KT]) {
#pragma unroll
  for (int j = 0; j < KT; ++j) to[j] = TilePointers<T>(pack, data, j, lane, batch, row);
}

// c[16 rows of a, 16 rows of b] += a b^T over the columns of a span.
template <typename T>
__device__ __forceinline__ void add_products(float (&c)[2][4], const Span& a, const Span& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t from[4] = {a.low[2 * half], a.high[2 * half], a.low[2 * half + 1], a.high[2 * half + 1]};
    multiply_add<T>(c[0], from, b.low[2 * half], b.low[2 * half + 1]);
    multiply_add<T>(c[1], from, b.high[2 * half], b.high[2 * half + 1]);
  }
}

// Returns whether one of two 16-bit elements is Inf or NaN: all bits of its exponent are set.
__device__ __forceinline__ bool broken(uint32_t pair, __nv_bfloat16) {
  return (pair & 0x7f80u) == 0x7f80u || (pair & 0x7f800000u) == 0x7f800000u;
}

__device__ __forceinline__ bool broken(uint32_t pair, __half) {
  return (pair & 0x7c00u) == 0x7c00u || (pair & 0x7c000000u) == 0x7c000000u;
}

// The tiles of the rows and of the columns of a block of weights.
struct Block {
  int row_tile, column_tile, slots;
};

// c[16, a span] += weights[16, 16] * x[16 rows, a span]; c[j] has the lane's columns 2j and 2j + 1. Weights between two
// sequences are zero, but 0 * Inf is NaN: if x is not finite, each sequence is multiplied by itself.
template <typename T>
__device__ __forceinline__ void add_weighted(float (&c)[4][4], const uint32_t (&weights)[4], const Span& x,
                                             const Block& block, Lane lane) {
  bool vote = false;
#pragma unroll
  for (int j = 0; j < 4; ++j) vote = vote || broken(x.low[j], T{}) || broken(x.high[j], T{});
  if (__ballot_sync(kAllLanes, vote) == 0) {
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_add<T>(c[j], weights, transposed(x.low[j]), transposed(x.high[j]));
    return;
  }
  const int row = block.row_tile * kTile + lane.g, column = block.column_tile * kTile + lane.g;
#pragma unroll 1
  for (int begin = 0; begin < kMostSlots; begin += block.slots) {
    const auto inside = [&](int place) { return place >= begin && place < begin + block.slots; };
    const bool low = inside(column), high = inside(column + 8);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float own[4] = {};
      multiply_add<T>(own, weights, transposed(low ? x.low[j] : 0), transposed(high ? x.high[j] : 0));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (inside(row + i / 2 * 8)) c[j][i] += own[i];
      }
    }
  }
}

__device__ __forceinline__ uint32_t pair(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ uint32_t pair(float x, float y, __half) {
  const __half2 both = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// A 16 x 16 block of results, rounded, as the left factor of a product.
template <typename T>
__device__ __forceinline__ void as_factor(const float (&c)[2][4], uint32_t (&to)[4]) {
  to[0] = pair(c[0][0], c[0][1], T{}), to[1] = pair(c[0][2], c[0][3], T{});
  to[2] = pair(c[1][0], c[1][1], T{}), to[3] = pair(c[1][2], c[1][3], T{});
}

// The transposed block, rounded, as the left factor of a product.
__device__ __forceinline__ void transpose_factor(uint32_t (&x)[4]) {
  const uint32_t low = transposed(x[2]), high = transposed(x[1]);
  x[0] = transposed(x[0]), x[1] = low, x[2] = high, x[3] = transposed(x[3]);
}

// Stores one span of 16 rows, scale * c, rounded. `to` is the pack's first row, `step` the stride of rows.
template <typename T>
__device__ __forceinline__ void write_span(const float (&c)[4][4], float scale, T* to, int64_t step, int rows, int tile,
                                           int span, Lane lane, int width) {
  const int column = span * kSpan + 8 * lane.t, r = tile * kTile + lane.g;
  if (column >= width) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (r + 8 * half >= rows) continue;
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = pair(c[j][2 * half] * scale, c[j][2 * half + 1] * scale, T{});
    store_vector(to + (r + 8 * half) * step + column, v);
  }
}

// Reductions over the four lanes of a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

}  // namespace bt
