// The CUDA kernels of the ops run by the emulator, behind a C interface for ctypes. Every function takes the dtype (0
// float32, 1 float64, 2 bfloat16, 3 float16), whether to run threads in reverse order, tensors and numbers in the order
// in which the function reads them, and returns a message, empty where all went well.
#include "emulator.h"

#include "gather_embed.cuh"
#include "gather_merge.cuh"
#include "pool_video_tokens.cuh"
#include "temporal_attention.cuh"

#include <limits>

namespace {

using bt::Places;
using bt::sum_t;

// Pointers and numbers in order.
struct Reader {
  void* const* tensor;
  const int64_t* number;

  template <typename T>
  T* next() {
    return static_cast<T*>(*tensor++);
  }
  int64_t operator()() { return *number++; }

  Places places() {
    Places s;
    s.index = next<const int64_t>();
    s.frame_counts = next<const int64_t>();
    s.batch = (*this)();
    s.patches = (*this)();
    s.frames = static_cast<int>((*this)());
    s.tokens = (*this)();
    s.width = (*this)();
    return s;
  }
  template <typename T>
  bt::Tower<T> tower() {
    const T* data = next<const T>();
    const int64_t batch = (*this)(), frame = (*this)(), token = (*this)();
    return {data, batch, frame, token};
  }
  template <typename T>
  bt::Rows<T> rows() {
    const T* data = next<const T>();
    const int64_t batch = (*this)(), row = (*this)();
    return {data, batch, row};
  }
};

std::string message;

template <typename F>
const char* with_dtype(int dtype, bool reversed, const F& f) {
  emulated::machine.error.clear();
  emulated::machine.reversed = reversed;
  if (dtype == 0) f(float{});
  if (dtype == 1) f(double{});
  if (dtype == 2) f(__nv_bfloat16{});
  if (dtype == 3) f(__half{});
  message = emulated::machine.error;
  return message.c_str();
}

// As the launchers choose: whole vectors where every start and step allows them.
template <typename T, typename F>
void with_vectors(std::initializer_list<const void*> starts, std::initializer_list<int64_t> steps, const F& f) {
  constexpr int whole = 16 / sizeof(T);
  if (bt::in_vectors_of(whole, starts, steps)) {
    f(std::integral_constant<int, whole>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// Memory as a GPU's allocator gives it: not zeros, and where an integer says which row, one that passes for a row.
template <typename T>
std::vector<T> garbage(int64_t size) {
  if constexpr (std::is_integral_v<T>) return std::vector<T>(size, 1);
  return std::vector<T>(size, std::numeric_limits<T>::quiet_NaN());
}

constexpr emulated::On on;

}  // namespace

extern "C" {

// places; backbone, branch, grad, gate; rows_each; out or (null), grad_backbone, grad_branch, grad_gate
const char* gather_merge(int dtype, bool reversed, void* const* tensors, const int64_t* numbers) {
  return with_dtype(dtype, reversed, [&](auto zero) {
    using T = decltype(zero);
    Reader in{tensors, numbers};
    bt::MergeDevice<T> a;
    a.places = in.places();
    a.backbone = in.tower<T>();
    a.branch = in.rows<T>();
    a.grad = in.rows<T>();
    a.gate = in.next<const T>();
    const int64_t rows_each = in();
    T* out = in.next<T>();
    T* to[3] = {in.next<T>(), in.next<T>(), in.next<T>()};
    with_vectors<T>({a.backbone.data, a.branch.data, a.grad.data, a.gate},
                    {a.places.width, a.backbone.batch, a.backbone.frame, a.backbone.token, a.branch.batch, a.branch.row,
                     a.grad.batch, a.grad.row},
                    [&](auto vector) {
                      if (out) return bt::launch_merge_forward<T, vector>(on, a, out);
                      const int64_t partials = bt::parts(a.places.batch * (1 + a.places.tokens), rows_each);
                      auto partial = garbage<sum_t<T>>(to[2] ? partials * a.places.width : 0);
                      bt::launch_merge_backward<T, vector>(on, a, rows_each, to[0], to[1], to[2],
                                                           to[2] ? partial.data() : nullptr);
                    });
  });
}

// places; backbone, cls_token, pos, time; out
const char* gather_embed(int dtype, bool reversed, void* const* tensors, const int64_t* numbers) {
  return with_dtype(dtype, reversed, [&](auto zero) {
    using T = decltype(zero);
    Reader in{tensors, numbers};
    bt::EmbedDevice<T> a;
    a.places = in.places();
    a.backbone = in.tower<T>();
    a.cls_token = in.next<const T>();
    a.pos = in.next<const T>();
    a.time = in.next<const T>();
    T* out = in.next<T>();
    with_vectors<T>({a.backbone.data, a.cls_token, a.pos, a.time},
                    {a.places.width, a.backbone.batch, a.backbone.frame, a.backbone.token},
                    [&](auto vector) { bt::launch_embed_forward<T, vector>(on, a, out); });
  });
}

// places; grad; rows of time; grad_backbone, grad_cls_token, grad_pos, grad_time
const char* gather_embed_backward(int dtype, bool reversed, void* const* tensors, const int64_t* numbers) {
  return with_dtype(dtype, reversed, [&](auto zero) {
    using T = decltype(zero);
    Reader in{tensors, numbers};
    bt::EmbedGrad<T> a;
    a.places = in.places();
    a.grad = in.rows<T>();
    const int64_t time_rows = in();
    T* to[4] = {in.next<T>(), in.next<T>(), in.next<T>(), in.next<T>()};
    auto row_of = garbage<int32_t>(a.places.batch * a.places.patches * a.places.frames);
    a.row_of = row_of.data();
    with_vectors<T>({a.grad.data}, {a.places.width, a.grad.batch, a.grad.row}, [&](auto vector) {
      const bt::EmbedSums sums(a.places, vector, to[3], to[1] || to[2]);
      auto partial = garbage<sum_t<T>>(sums.size(a.places.width));
      bt::launch_embed_backward<T, vector>(on, a, sums, time_rows, row_of.data(), partial.data(), to[0], to[1], to[2],
                                           to[3]);
    });
  });
}

// places; backbone, branch; T'; out
const char* pool_video_tokens(int dtype, bool reversed, void* const* tensors, const int64_t* numbers) {
  return with_dtype(dtype, reversed, [&](auto zero) {
    using T = decltype(zero);
    Reader in{tensors, numbers};
    bt::PoolDevice<T> a{};
    a.places = in.places();
    a.backbone = in.tower<T>();
    a.branch = in.rows<T>();
    a.tower_frames = static_cast<int>(in());
    T* out = in.next<T>();
    auto row_of = garbage<int32_t>(a.places.batch * a.places.patches * a.places.frames);
    a.row_of = row_of.data();
    with_vectors<T>({a.backbone.data, a.branch.data},
                    {a.places.width, a.backbone.batch, a.backbone.frame, a.backbone.token, a.branch.batch,
                     a.branch.row},
                    [&](auto vector) { bt::launch_pool_forward<T, vector>(on, a, row_of.data(), out); });
  });
}

// places; grad; T'; grad_backbone, grad_branch
const char* pool_video_tokens_backward(int dtype, bool reversed, void* const* tensors, const int64_t* numbers) {
  return with_dtype(dtype, reversed, [&](auto zero) {
    using T = decltype(zero);
    Reader in{tensors, numbers};
    bt::PoolDevice<T> a{};
    a.places = in.places();
    a.grad = in.rows<T>();
    a.tower_frames = static_cast<int>(in());
    T* to[2] = {in.next<T>(), in.next<T>()};
    auto row_of = garbage<int32_t>(a.places.batch * a.places.patches * a.places.frames);
    a.row_of = row_of.data();
    with_vectors<T>({a.grad.data}, {a.places.width, a.grad.batch, a.grad.row}, [&](auto vector) {
      bt::launch_pool_backward<T, vector>(on, a, row_of.data(), to[0], to[1]);
    });
  });
}

// qkv, grad (null: forward), result; B, N, S, H, E; strides of qkv (batch, row, part, head) and grad (batch, row, head)
const char* temporal_attention(int dtype, bool reversed, void* const* tensors, const int64_t* numbers) {
  return with_dtype(dtype, reversed, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      Reader in{tensors, numbers};
      const T* qkv = in.next<const T>();
      const T* grad = in.next<const T>();
      T* out = in.next<T>();
      const int64_t batch = in(), tokens = in(), slots = in(), heads = in(), width = in();
      auto a = bt::temporal_device<T>(qkv, grad, batch, tokens, slots, heads, width);
      for (int64_t* stride : {&a.qkv_batch, &a.qkv_row, &a.qkv_part, &a.qkv_head, &a.grad_batch, &a.grad_row,
                              &a.grad_head}) {
        *stride = in();
      }
      if (grad) {
        bt::launch_temporal_backward(on, a, out);
      } else {
        bt::launch_temporal_forward(on, a, out);
      }
    }
  });
}

// Whether the emulator finds what it should: 0 lanes that part ways, 1 a missed __syncthreads, 2 a misaligned vector.
const char* broken(int which) {
  return with_dtype(0, false, [&](float) {
    const auto kernel = +[](int kind) {
      if (kind == 0 && threadIdx.x % 2) __ballot_sync(bt::kAllLanes, true);
      if (kind == 0 && threadIdx.x % 2 == 0) __syncwarp();
      if (kind == 1 && threadIdx.x < 32) __syncthreads();
      float x[4] = {};
      alignas(16) static float buffer[8];
      if (kind == 2) bt::read<float, 4>(buffer + 1, x);
    };
    on.run(kernel, 1, 64, which);
  });
}
}
