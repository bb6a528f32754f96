// Work memory of one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "attention_head.h"

namespace bt {

// Allocates `size` uninitialised elements, aligned for whole vectors.
template <typename A>
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t size)
      : memory_(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A),
                                               std::align_val_t{kScratchAlignment}))) {}
  A* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(A* memory) const { ::operator delete(memory, std::align_val_t{kScratchAlignment}); }
  };
  std::unique_ptr<A, Free> memory_;
};

}  // namespace bt
