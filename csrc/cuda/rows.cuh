// Helpers of the kernels on rows of D channels: 16-byte accesses, the tower's token of a row, sums. No .cuh file
// includes a torch header, so device code compiles without torch.
//
// A warp takes one row and loops over its columns in vectors of 16 bytes; V is the number of elements of a vector, 1 if
// rows are not a whole number of vectors. Grids have one dimension, because y and z are limited to 65,535.
// Legend: B videos, T frames, P patches, N visible rows, D width.
#pragma once

#include <initializer_list>

#include "warp.cuh"

namespace bt {

constexpr int kWarp = 32;
constexpr int kWarps = 8;                  // warps of a block
constexpr int kThreads = kWarp * kWarps;
// Blocks per multiprocessor requested for kernels with many registers: at most 80 registers a thread. Without it the
// compiler assumes more blocks on some targets, and spills.
constexpr int kBlocks = 3;

// Returns ceil(count / each), also on the device.
__host__ __device__ inline int64_t parts(int64_t count, int64_t each) { return (count + each - 1) / each; }

template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};
template <typename T>
using sum_t = typename Sum<T>::type;

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T at[V];
};

template <typename T, int V>
__device__ __forceinline__ void read(const T* from, sum_t<T> (&to)[V]) {
  check_aligned(from, sizeof(T) * V);
  const Vector<T, V> v = *reinterpret_cast<const Vector<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = static_cast<sum_t<T>>(v.at[i]);
}

template <typename T, int V>
__device__ __forceinline__ void write(T* to, const sum_t<T> (&from)[V]) {
  check_aligned(to, sizeof(T) * V);
  Vector<T, V> v;
#pragma unroll
  for (int i = 0; i < V; ++i) v.at[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Vector<T, V>*>(to) = v;
}

template <typename T, int V>
__device__ __forceinline__ void fill(T* to, sum_t<T> value) {
  sum_t<T> all[V];
#pragma unroll
  for (int i = 0; i < V; ++i) all[i] = value;
  write<T, V>(to, all);
}

// Returns whether rows with these starts and strides (in elements) can be accessed in whole vectors of 16 bytes.
inline bool in_vectors_of(int64_t elements, std::initializer_list<const void*> starts,
                          std::initializer_list<int64_t> steps) {
  for (const void* start : starts) {
    if (reinterpret_cast<uintptr_t>(start) % 16) return false;
  }
  for (int64_t step : steps) {
    if (step % elements) return false;
  }
  return true;
}

// The place of each of the N rows of a video: p*T + t, or -1 for padding. The launchers check that P*T fits 32 bits: a
// place is divided by T in every row, and 64-bit division costs registers.
struct Places {
  const int64_t* index;         // [B, N]
  const int64_t* frame_counts;  // [B], or null: all frames are real
  int frames;
  int64_t batch, patches, tokens, width;

  // Returns the number of real frames of `of`, at most T: a wrong count must not cause reads past the tensor.
  __device__ int real_frames(int64_t b, int of) const {
    if (!frame_counts) return of;
    const int64_t count = frame_counts[b];
    return count < 0 ? 0 : (count < of ? static_cast<int>(count) : of);
  }
  __device__ int real_frames(int64_t b) const { return real_frames(b, frames); }
  __device__ int64_t at(int64_t b, int64_t n) const { return index[b * tokens + n]; }
  __device__ int patch(int64_t place) const { return static_cast<int>(place) / frames; }
  // Places past the end give rows of NaN: reading them is not safe, and zeros would hide the mistake.
  __device__ bool outside(int64_t place) const { return place >= frames * patches; }
};

// A tensor [B, T, 1+P, D] with its strides in elements.
template <typename T>
struct Tower {
  const T* data;
  int64_t batch, frame, token;

  __device__ const T* at(int64_t b, int64_t t, int64_t k) const { return data + b * batch + t * frame + k * token; }
};

// A tensor [B, rows, D] with its strides in elements.
template <typename T>
struct Rows {
  const T* data;
  int64_t batch, row;

  __device__ const T* at(int64_t b, int64_t r) const { return data + b * batch + r * row; }
};

// Returns the tower's token at a place.
template <typename T>
__device__ __forceinline__ const T* token_at(const Tower<T>& tower, const Places& places, int64_t b, int64_t place) {
  const int p = places.patch(place), t = static_cast<int>(place) - p * places.frames;
  return tower.at(b, t, 1 + p);
}

// Averages token k of video b over its first `frames` frames, at column d; 0 for no frames.
template <typename T, int V>
__device__ __forceinline__ void mean_over_frames(const Tower<T>& tower, int64_t b, int64_t k, int64_t d, int frames,
                                                 sum_t<T> (&mean)[V]) {
  const T* from = tower.at(b, 0, k) + d;
#pragma unroll
  for (int i = 0; i < V; ++i) mean[i] = 0;
#pragma unroll 4
  for (int t = 0; t < frames; ++t) {
    sum_t<T> value[V];
    read<T, V>(from + t * tower.frame, value);
#pragma unroll
    for (int i = 0; i < V; ++i) mean[i] += value[i];
  }
  const sum_t<T> scale = frames > 0 ? sum_t<T>(1) / static_cast<sum_t<T>>(frames) : sum_t<T>(0);
#pragma unroll
  for (int i = 0; i < V; ++i) mean[i] *= scale;
}

// Blocks per video: block 0 has its CLS row, block 1 + j has kWarps of its N patch rows. Grid: B times this.
__host__ __device__ inline int64_t row_blocks(int64_t tokens) { return 1 + parts(tokens, kWarps); }

// sum += the rows at from + `offset` of every lane whose bit is set in `chosen`, at column d; read[..] is valid only
// if `inside`. All lanes of the warp call it together. Four reads overlap.
template <typename T, int V>
__device__ __forceinline__ void add_rows(const T* from, unsigned chosen, int64_t offset, int64_t d, bool inside,
                                         sum_t<T> (&sum)[V]) {
  constexpr int kAhead = 4;
  while (chosen) {
    sum_t<T> value[kAhead][V];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const bool any = chosen != 0;
      const int64_t at = __shfl_sync(kAllLanes, offset, any ? __ffs(chosen) - 1 : 0);
      chosen &= chosen - 1;
#pragma unroll
      for (int i = 0; i < V; ++i) value[j][i] = 0;
      if (any && inside) read<T, V>(from + at + d, value[j]);
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += value[j][i];
    }
  }
}

// Sums partial[:, column] of [partials, width] for column = blockIdx.x * kWarp + lane; the total is in warp 0.
template <typename S>
__device__ __forceinline__ S sum_of_partials(const S* partial, int64_t partials, int64_t width, int64_t column) {
  __shared__ S of_warp[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  S total = 0;
  if (column < width) {
    for (int64_t i = warp; i < partials; i += kWarps) total += partial[i * width + column];
  }
  of_warp[warp][lane] = total;
  __syncthreads();
  if (warp == 0) {
    for (int w = 1; w < kWarps; ++w) total += of_warp[w][lane];
  }
  return total;
}

// Inverts the index: row_of [B, P*T], which must hold zeros, becomes 1 + n where row n has that place (row 0 is CLS).
// The places of a video are distinct, so no two threads write the same entry. Grid: ceil(B*N / kThreads).
static __global__ void __launch_bounds__(kThreads) rows_of_places(const Places places, int32_t* __restrict__ row_of) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= places.batch * places.tokens) return;
  const int64_t b = i / places.tokens, place = places.index[i];
  if (place < 0 || places.outside(place)) return;
  row_of[b * places.patches * places.frames + place] = static_cast<int32_t>(1 + i - b * places.tokens);
}

// `On` is class Launch, or the emulator of the tests.
template <typename On>
void launch_rows_of_places(const On& on, const Places& places, int32_t* row_of) {
  on.zero(row_of, places.batch * places.patches * places.frames * sizeof(int32_t));
  on.run(rows_of_places, parts(places.batch * places.tokens, kThreads), kThreads, places, row_of);
}

}  // namespace bt
