// Which instruction set: the best one that this machine can run, or the one that was asked for.
#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

namespace gptcore {

#if !defined(__x86_64__)
const Isa* avx2() { return nullptr; }
const Isa* avx512() { return nullptr; }
#endif
#if !defined(__aarch64__)
const Isa* neon() { return nullptr; }
#endif

const Isa* const* all_isas() {
  static const Isa* found[5] = {};
  static const bool done = [] {
    int n = 0;
    for (const Isa* isa : {avx512(), avx2(), neon(), generic()})
      if (isa) found[n++] = isa;
    return true;
  }();
  (void)done;
  return found;
}

static const Isa* find(const char* name) {
  for (const Isa* const* isa = all_isas(); *isa; ++isa)
    if (!std::strcmp((*isa)->name, name)) return *isa;
  return nullptr;
}

static const Isa*& current() {
  static const Isa* chosen = all_isas()[0];
  return chosen;
}

const Isa& isa() { return *current(); }

bool set_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa) current() = isa;
  return isa != nullptr;
}

void* scratch(size_t n_bytes) {
  struct Memory {
    void* data = nullptr;
    size_t n_bytes = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;  // a fresh large allocation would cost a page fault for every 4 kB, every call
  if (n_bytes > memory.n_bytes) {
    n_bytes = (n_bytes + 4095) / 4096 * 4096;
    std::free(memory.data);
    memory.n_bytes = 0;
    memory.data = std::aligned_alloc(64, n_bytes);
    if (!memory.data) throw std::bad_alloc();
    memory.n_bytes = n_bytes;
  }
  return memory.data;
}

}  // namespace gptcore
