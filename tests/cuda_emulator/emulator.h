// Runs CUDA device code on the CPU: include this before the .cuh files, compile as C++ with BT_EMULATED defined.
//
// Blocks run one after another. Each thread of a block is a fiber that runs until it waits for others: at
// __syncthreads, or where a warp does something together (shuffle, ballot, matrix product). Beyond results it finds
// what would hang or crash a GPU: lanes of a warp that part ways before a common operation, threads that miss a
// __syncthreads, misaligned vectors. A warp runs on for as long as it need not wait for another, and with `reversed`
// the last block, warp and lane come first: a result that rests on a missing synchronisation differs between the two,
// or is wrong in both. It does not find a read past the end whose value goes nowhere. Every shared array is one static
// for all blocks, so it starts as what the last block left.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

// A block's shared memory: blocks and fibers are of one host thread, so one static copy serves.
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__

namespace emulated {

struct Index {
  unsigned x;
};

struct Barrier {
  int arrived = 0;
  int64_t passed = 0;
};

constexpr int kLanes = 32;
constexpr size_t kStack = 128 * 1024, kMessage = 64;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  const Barrier* waits_for = nullptr;
  int64_t until = 0;
  int64_t collectives = 0;  // how many the lane has been part of

  bool ready() const { return !done && (!waits_for || waits_for->passed > until); }
};

// What the lanes of a warp show each other. Two sets, used in turn: no lane can be two operations ahead.
struct Warp {
  Barrier barrier;
  struct Shown {
    int operation;
    alignas(16) char data[kMessage];
  } shown[2][kLanes];
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier block;
  ucontext_t scheduler;
  int current = 0, threads = 0;
  bool reversed = false;
  std::string error;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;

  void leave() { swapcontext(&fibers[current].context, &scheduler); }
  // Ends the launch with a message; never returns to the fiber.
  [[noreturn]] void fail(const std::string& what) {
    if (error.empty()) error = what;
    leave();
    __builtin_unreachable();
  }
  void wait(Barrier& barrier, int parties) {
    if (++barrier.arrived == parties) {
      barrier.arrived = 0;
      ++barrier.passed;
      return;
    }
    Fiber& me = fibers[current];
    me.waits_for = &barrier;
    me.until = barrier.passed;
    leave();
    me.waits_for = nullptr;
  }
};

inline Machine machine;
inline Index block_index;

// Read anew after every switch of fibers.
inline Index thread_index() { return {static_cast<unsigned>(machine.current)}; }

inline void fiber_main() {
  machine.body(machine.arguments);
  machine.fibers[machine.current].done = true;
  machine.leave();
}

// Each lane of a warp that can go on does, up to where it waits; false where none can.
inline bool run_warp(int warp, int& left) {
  Machine& m = machine;
  bool any = false;
  const int lanes = std::min(kLanes, m.threads - warp * kLanes);
  for (int turn = 0; turn < lanes; ++turn) {
    const int i = warp * kLanes + (m.reversed ? lanes - 1 - turn : turn);
    if (!m.fibers[i].ready()) continue;
    any = true;
    m.current = i;
    swapcontext(&m.scheduler, &m.fibers[i].context);
    if (!m.error.empty()) return true;
    left -= m.fibers[i].done;
  }
  return any;
}

inline void run_block(int threads) {
  Machine& m = machine;
  m.threads = threads;
  if (m.fibers.size() < static_cast<size_t>(threads)) m.fibers.resize(threads);
  m.warps.assign((threads + kLanes - 1) / kLanes, Warp());
  m.block = Barrier();
  for (int i = 0; i < threads; ++i) {
    Fiber& f = m.fibers[i];
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    f.done = false;
    f.waits_for = nullptr;
    f.collectives = 0;
    makecontext(&f.context, fiber_main, 0);
  }
  // One warp goes on until it waits for another: on a GPU warps may be as far apart, and a result that rests on a
  // missing __syncthreads is then wrong.
  const int warps = static_cast<int>(m.warps.size());
  for (int left = threads; left > 0;) {
    bool any = false;
    for (int turn = 0; turn < warps; ++turn) {
      const int warp = m.reversed ? warps - 1 - turn : turn;
      while (run_warp(warp, left)) {
        any = true;
        if (!m.error.empty()) return;
      }
    }
    if (!any) {
      m.error = "threads of a block wait for others that ended or wait elsewhere";
      return;
    }
  }
}

// Each lane shows `mine`; `result` is then called with a function that gives the value of lane l.
template <typename T, typename F>
auto together(int operation, const T& mine, const F& result) {
  static_assert(sizeof(T) <= kMessage && std::is_trivially_copyable_v<T>);
  Machine& m = machine;
  if (m.threads % kLanes) m.fail("a warp is not full");
  Fiber& me = m.fibers[m.current];
  Warp& warp = m.warps[m.current / kLanes];
  auto& shown = warp.shown[me.collectives++ % 2];
  auto& own = shown[m.current % kLanes];
  own.operation = operation;
  std::memcpy(own.data, &mine, sizeof(T));
  m.wait(warp.barrier, kLanes);
  for (const auto& other : shown) {
    if (other.operation != operation) m.fail("the lanes of a warp are at different operations");
  }
  return result([&](int lane) {
    T value;
    std::memcpy(&value, shown[lane].data, sizeof(T));
    return value;
  });
}

enum Operation { kBallot, kShuffle, kShuffleXor, kTranspose, kMultiply, kSyncWarp };

inline int lane() { return machine.current % kLanes; }

// The float of one half of a register.
template <typename T>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
  return static_cast<float>(std::bit_cast<T>(bits));
}

// Stands in for class Launch.
struct On {
  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) const {
    auto call = [&] { kernel(arguments...); };
    machine.body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
    machine.arguments = &call;
    for (int64_t i = 0; i < blocks && machine.error.empty(); ++i) {
      block_index.x = static_cast<unsigned>(machine.reversed ? blocks - 1 - i : i);
      run_block(threads);
    }
  }
  void zero(void* data, size_t bytes) const {
    if (bytes) std::memset(data, 0, bytes);
  }
};

}  // namespace emulated

#define threadIdx emulated::thread_index()
#define blockIdx emulated::block_index

inline void __syncthreads() { emulated::machine.wait(emulated::machine.block, emulated::machine.threads); }
inline void __syncwarp() {
  emulated::together(emulated::kSyncWarp, 0, [](auto) { return 0; });
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulated::together(emulated::kBallot, vote, [](auto of) {
    unsigned all = 0;
    for (int l = 0; l < emulated::kLanes; ++l) all |= static_cast<unsigned>(of(l)) << l;
    return all;
  });
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulated::together(emulated::kShuffle, value, [=](auto of) { return of(from % emulated::kLanes); });
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::together(emulated::kShuffleXor, value, [=](auto of) { return of(emulated::lane() ^ mask); });
}

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T min(T a, T b) {
  return a < b ? a : b;
}

namespace bt {

constexpr unsigned kAllLanes = 0xffffffffu;

inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) emulated::machine.fail("a vector is misaligned");
}

inline float power_of_two(float x) { return std::exp2(x); }

inline void store_vector(void* to, const uint32_t (&v)[4]) {
  check_aligned(to, 16);
  std::memcpy(to, v, 16);
}

// The fragments' layout as PTX defines it for mma.m16n8k16; sums in float64, so that they are the exact product's
// closest float32 but for one rounding.
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Factors {
    uint32_t a[4], b[2];
  };
  emulated::together(emulated::kMultiply, Factors{{a[0], a[1], a[2], a[3]}, {b0, b1}}, [&](auto of) {
    const int g = emulated::lane() / 4, t = emulated::lane() % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
      double sum = c[i];
      for (int k = 0; k < 16; ++k) {
        const Factors of_a = of(row % 8 * 4 + k % 8 / 2), of_b = of(column * 4 + k % 8 / 2);
        sum += static_cast<double>(emulated::half_of<T>(of_a.a[row / 8 + 2 * (k / 8)], k % 2)) *
               emulated::half_of<T>(of_b.b[k / 8], k % 2);
      }
      c[i] = static_cast<float>(sum);
    }
    return 0;
  });
}

inline uint32_t transposed(uint32_t pair) {
  return emulated::together(emulated::kTranspose, pair, [](auto of) {
    const int g = emulated::lane() / 4, t = emulated::lane() % 4;
    uint32_t out = 0;
    for (int i = 0; i < 2; ++i) {
      const uint32_t from = of((2 * t + i) * 4 + g / 2);
      out |= (g % 2 ? from >> 16 : from & 0xffffu) << (16 * i);
    }
    return out;
  });
}

}  // namespace bt
