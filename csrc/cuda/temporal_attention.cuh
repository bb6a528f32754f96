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
#pragma once

#include "temporal_tiles.cuh"

namespace bt {

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
