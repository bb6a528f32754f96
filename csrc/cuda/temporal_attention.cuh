// Device code of temporal_attention on a regular grid, for 16-bit types on tensor cores.
//   S = q k^T / sqrt(E),  P = softmax(S),  out = P v          within each sequence of S neighbouring rows and each head
//   dV = P^T dO,  dP = dO v^T,  dS = P * (dP - rowsum(P * dP)),  dQ = dS k / sqrt(E),  dK = dS^T q / sqrt(E)
// qkv and its gradient [B, N, 3, H, E], out and grad [B, N, H, E]; row n belongs to sequence n / S.
//
// A pack is the work of a group of KT warps: as many whole sequences as fit KT tiles of 16 rows, KT = 1 for sequences
// of up to 16 rows, 4 for up to 64. Scores between two sequences of a pack are masked. Their products are wasted, but
// memory traffic limits the speed. Inf or NaN stays in its own sequence although 0 * Inf is NaN (add_weighted). Each
// warp has the 16 queries of one tile and all keys of the pack; in the second half of the backward pass it has the 16
// keys of one tile and all queries.
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

// The keys of a query's sequence. The query is the lane's row `half` of its tile.
struct OwnKeys {
  int before, slots;  // rows from the first of them to the lane's first key

  __device__ OwnKeys(int tile, int slots_in, int half, Lane lane)
      : before(2 * lane.t - (tile * kTile + lane.g + 8 * half) / slots_in * slots_in), slots(slots_in) {}
  // Returns whether element i of the lane's row in the scores with tile j is for one of them.
  __device__ __forceinline__ bool has(int j, int i) const {
    return static_cast<unsigned>(before + j * kTile + i / 2 * 8 + i % 2) < static_cast<unsigned>(slots);
  }
};

// Turns scores of the tile's queries with all keys into probabilities, zero between sequences. Every row, also one
// outside the pack, has at least one key (scores of absent rows are 0), so no maximum of finite scores is infinite.
template <int KT>
__device__ __forceinline__ void softmax(float (&s)[KT][2][4], int tile, int slots, float scale, Lane lane) {
  const float factor = scale * 1.4426950408889634f;  // exp(x) = 2^(x log2 e)
  const bool several = slots != KT * kTile;  // sequences in a pack, or rows without one
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const OwnKeys own(tile, slots, half, lane);
    float most = -INFINITY, sum = 0;
#pragma unroll
    for (int j = 0; j < KT; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[j][i / 2][2 * half + i % 2];
        if (several && !own.has(j, i)) x = -INFINITY;
        most = fmaxf(most, x);
      }
    }
    most = row_max(most);
#pragma unroll
    for (int j = 0; j < KT; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[j][i / 2][2 * half + i % 2];
        x = power_of_two((x - most) * factor);
        sum += x;
      }
    }
    const float share = 1 / row_sum(sum);
#pragma unroll
    for (int j = 0; j < KT; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[j][i / 2][2 * half + i % 2];
        x = several && !own.has(j, i) ? 0 : x * share;  // 0 * NaN is NaN
      }
    }
  }
}

// Grid: ceil(groups / (kTemporalWarps / KT)). A warp that has a whole pack (KT = 1) loads all its rows to registers,
// in SPANS spans of columns, whose loads overlap; with several tiles it loops over the spans.
template <typename T, int KT, int SPANS>
__global__ void __launch_bounds__(kTemporalThreads)
    temporal_forward(const TemporalDevice<T> a, T* __restrict__ out) {
  const Pack<T, KT> pack(a);
  const Lane lane;
  const int tile = threadIdx.x / 32 % KT;
  if (tile * kTile >= pack.rows) return;
  const int64_t shift = pack.head * a.qkv_head, v_shift = shift + 2 * a.qkv_part, k_shift = shift + a.qkv_part;
  const TilePointers<T> own(pack, a.qkv, tile, lane, a.qkv_batch, a.qkv_row);
  TilePointers<T> tiles[KT];
  if constexpr (KT > 1) all_tiles<T, KT>(pack, a.qkv, lane, a.qkv_batch, a.qkv_row, tiles);
  T* to = out + static_cast<int64_t>(pack.first) * a.heads * a.width + pack.head * a.width;
  const int64_t step = static_cast<int64_t>(a.heads) * a.width;

  float p[KT][2][4] = {};
  Span v[SPANS];  // for a pack of one tile, loaded early
  if constexpr (KT == 1) {
    Span q[SPANS], k[SPANS];
#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
      q[span] = own.read(shift, span, lane, a.width);
      k[span] = own.read(k_shift, span, lane, a.width);
    }
#pragma unroll
    for (int span = 0; span < SPANS; ++span) v[span] = own.read(v_shift, span, lane, a.width);
#pragma unroll
    for (int span = 0; span < SPANS; ++span) add_products<T>(p[0], q[span], k[span]);
  } else {
#pragma unroll 1
    for (int span = 0; span * kSpan < a.width; ++span) {
      const Span q = own.read(shift, span, lane, a.width);
#pragma unroll
      for (int j = 0; j < KT; ++j) {
        add_products<T>(p[j], q, tiles[j].read(k_shift, span, lane, a.width));
      }
    }
  }
  softmax<KT>(p, tile, a.slots, a.scale, lane);
  uint32_t weights[KT][4];
#pragma unroll
  for (int j = 0; j < KT; ++j) as_factor<T>(p[j], weights[j]);
  if constexpr (KT == 1) {
#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
      float c[4][4] = {};
      add_weighted<T>(c, weights[0], v[span], {0, 0, a.slots}, lane);
      write_span<T>(c, 1, to, step, pack.rows, tile, span, lane, a.width);
    }
  } else {
#pragma unroll 1
    for (int span = 0; span * kSpan < a.width; ++span) {
      float c[4][4] = {};
#pragma unroll
      for (int j = 0; j < KT; ++j) {
        add_weighted<T>(c, weights[j], tiles[j].read(v_shift, span, lane, a.width), {tile, j, a.slots}, lane);
      }
      write_span<T>(c, 1, to, step, pack.rows, tile, span, lane, a.width);
    }
  }
}

// Replaces dP by dS, with the sum over the keys of P * dP; zero between sequences.
template <int KT>
__device__ __forceinline__ void softmax_backward(const float (&p)[KT][2][4], float (&ds)[KT][2][4], int tile,
                                                 int slots, Lane lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const OwnKeys own(tile, slots, half, lane);
    float delta = 0;
#pragma unroll
    for (int j = 0; j < KT; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = ds[j][i / 2][2 * half + i % 2];
        if (!own.has(j, i)) x = 0;
        delta += p[j][i / 2][2 * half + i % 2] * x;
      }
    }
    delta = row_sum(delta);
#pragma unroll
    for (int j = 0; j < KT; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = ds[j][i / 2][2 * half + i % 2];
        x = own.has(j, i) ? p[j][i / 2][2 * half + i % 2] * (x - delta) : 0;
      }
    }
  }
}

// The grid is that of the forward. In a pack of several tiles, shared memory passes the queries' rows of P and dS,
// transposed, to the warps that have the keys.
template <typename T, int KT, int SPANS>
__global__ void __launch_bounds__(kTemporalThreads)
    temporal_backward(const TemporalDevice<T> a, T* __restrict__ grad_qkv) {
  const Pack<T, KT> pack(a);
  const Lane lane;
  const int tile = threadIdx.x / 32 % KT;
  const int64_t shift = pack.head * a.qkv_head, v_shift = shift + 2 * a.qkv_part, k_shift = shift + a.qkv_part;
  const int64_t grad_shift = pack.head * a.grad_head;
  const TilePointers<T> own(pack, a.qkv, tile, lane, a.qkv_batch, a.qkv_row);
  const TilePointers<T> own_grad(pack, a.grad, tile, lane, a.grad_batch, a.grad_row);
  const int64_t part = static_cast<int64_t>(a.heads) * a.width, step = 3 * part;
  T* to = grad_qkv + pack.first * step + pack.head * a.width;

  float p[KT][2][4] = {}, ds[KT][2][4] = {};
  if constexpr (KT == 1) {
    Span q[SPANS], k[SPANS], v[SPANS], grad[SPANS];
#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
      q[span] = own.read(shift, span, lane, a.width);
      k[span] = own.read(k_shift, span, lane, a.width);
    }
#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
      v[span] = own.read(v_shift, span, lane, a.width);
      grad[span] = own_grad.read(grad_shift, span, lane, a.width);
    }
#pragma unroll
    for (int span = 0; span < SPANS; ++span) add_products<T>(p[0], q[span], k[span]);
#pragma unroll
    for (int span = 0; span < SPANS; ++span) add_products<T>(ds[0], grad[span], v[span]);
    softmax<KT>(p, tile, a.slots, a.scale, lane);
    softmax_backward<KT>(p, ds, tile, a.slots, lane);
    uint32_t weights[4], slopes[4];
    as_factor<T>(p[0], weights);
    as_factor<T>(ds[0], slopes);
#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
      float c[4][4] = {};
      add_weighted<T>(c, slopes, k[span], {0, 0, a.slots}, lane);
      write_span<T>(c, a.scale, to, step, pack.rows, tile, span, lane, a.width);
    }
    transpose_factor(weights);
    transpose_factor(slopes);
#pragma unroll
    for (int span = 0; span < SPANS; ++span) {
      float c[4][4] = {}, dv[4][4] = {};
      add_weighted<T>(c, slopes, q[span], {0, 0, a.slots}, lane);
      write_span<T>(c, a.scale, to + part, step, pack.rows, tile, span, lane, a.width);
      add_weighted<T>(dv, weights, grad[span], {0, 0, a.slots}, lane);
      write_span<T>(dv, 1, to + 2 * part, step, pack.rows, tile, span, lane, a.width);
    }
  } else {
    __shared__ uint4 weights_of[kTemporalWarps][KT][32];
    __shared__ uint4 slopes_of[kTemporalWarps][KT][32];
    const int warp = threadIdx.x / 32, number = threadIdx.x % 32, group = warp - tile;
    TilePointers<T> tiles[KT], grads[KT];
    all_tiles<T, KT>(pack, a.qkv, lane, a.qkv_batch, a.qkv_row, tiles);
    // Scores first, then the gradients of the probabilities: both at once would take too many registers.
#pragma unroll 1
    for (int span = 0; span * kSpan < a.width; ++span) {
      const Span q = own.read(shift, span, lane, a.width);
#pragma unroll
      for (int j = 0; j < KT; ++j) add_products<T>(p[j], q, tiles[j].read(k_shift, span, lane, a.width));
    }
    softmax<KT>(p, tile, a.slots, a.scale, lane);
#pragma unroll 1
    for (int span = 0; span * kSpan < a.width; ++span) {
      const Span grad = own_grad.read(grad_shift, span, lane, a.width);
#pragma unroll
      for (int j = 0; j < KT; ++j) add_products<T>(ds[j], grad, tiles[j].read(v_shift, span, lane, a.width));
    }
    softmax_backward<KT>(p, ds, tile, a.slots, lane);
    uint32_t slopes[KT][4];
#pragma unroll
    for (int j = 0; j < KT; ++j) {
      uint32_t x[4];
      as_factor<T>(p[j], x);
      transpose_factor(x);
      weights_of[warp][j][number] = make_uint4(x[0], x[1], x[2], x[3]);
      as_factor<T>(ds[j], slopes[j]);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = slopes[j][i];
      transpose_factor(x);
      slopes_of[warp][j][number] = make_uint4(x[0], x[1], x[2], x[3]);
    }
#pragma unroll 1
    for (int span = 0; span * kSpan < a.width; ++span) {
      float c[4][4] = {};
#pragma unroll
      for (int j = 0; j < KT; ++j) {
        add_weighted<T>(c, slopes[j], tiles[j].read(k_shift, span, lane, a.width), {tile, j, a.slots}, lane);
      }
      write_span<T>(c, a.scale, to, step, pack.rows, tile, span, lane, a.width);
    }
    __syncthreads();
    // The warp's keys, one gradient after the other: both at once would take too many registers.
    const auto write_keys = [&](const auto& factors, const TilePointers<T>(&rows)[KT], int64_t from, float scale,
                                T* at) {
#pragma unroll 1
      for (int span = 0; span * kSpan < a.width; ++span) {
        float c[4][4] = {};
#pragma unroll
        for (int i = 0; i < KT; ++i) {
          const uint4 f = factors[group + i][tile][number];
          add_weighted<T>(c, {f.x, f.y, f.z, f.w}, rows[i].read(from, span, lane, a.width), {tile, i, a.slots}, lane);
        }
        write_span<T>(c, scale, at, step, pack.rows, tile, span, lane, a.width);
      }
    };
    write_keys(slopes_of, tiles, shift, a.scale, to + part);
    all_tiles<T, KT>(pack, a.grad, lane, a.grad_batch, a.grad_row, grads);
    write_keys(weights_of, grads, grad_shift, 1, to + 2 * part);
  }
}

// Number of warps of a pack.
inline int pack_tiles(int slots) { return slots <= kTile ? 1 : kMostSlots / kTile; }

// A call without its strides.
template <typename T>
TemporalDevice<T> temporal_device(const T* qkv, const T* grad, int64_t batch, int64_t tokens, int64_t slots,
                                  int64_t heads, int64_t width) {
  TemporalDevice<T> a{};
  a.qkv = qkv;
  a.grad = grad;
  a.slots = static_cast<int>(slots);
  a.heads = static_cast<int>(heads);
  a.width = static_cast<int>(width);
  a.tokens = static_cast<int>(tokens);
  a.row_count = static_cast<int>(batch * tokens);
  a.pack_rows = pack_tiles(a.slots) * kTile / a.slots * a.slots;
  a.groups = static_cast<int>((batch * tokens + a.pack_rows - 1) / a.pack_rows * heads);
  a.scale = 1 / sqrtf(static_cast<float>(width));
  return a;
}

// Calls f.template operator()<KT, SPANS>() for the smallest kernel that takes the call.
template <typename F>
void dispatch_temporal(int slots, int width, const F& f) {
  if (pack_tiles(slots) > 1) return f.template operator()<kMostSlots / kTile, 1>();
  if (width <= 2 * kSpan) return f.template operator()<1, 2>();
  if (width <= 3 * kSpan) return f.template operator()<1, 3>();
  f.template operator()<1, kMostWidth / kSpan>();
}

// `On` is class Launch, or the emulator of the tests.
template <typename T, typename On>
void launch_temporal_forward(const On& on, const TemporalDevice<T>& a, T* out) {
  dispatch_temporal(a.slots, a.width, [&]<int KT, int SPANS>() {
    const int each = kTemporalWarps / KT;
    on.run(temporal_forward<T, KT, SPANS>, (static_cast<int64_t>(a.groups) + each - 1) / each, kTemporalThreads, a,
           out);
  });
}

template <typename T, typename On>
void launch_temporal_backward(const On& on, const TemporalDevice<T>& a, T* grad_qkv) {
  dispatch_temporal(a.slots, a.width, [&]<int KT, int SPANS>() {
    const int each = kTemporalWarps / KT;
    on.run(temporal_backward<T, KT, SPANS>, (static_cast<int64_t>(a.groups) + each - 1) / each, kTemporalThreads, a,
           grad_qkv);
  });
}

}  // namespace bt
