// A GPU on one CPU thread, for the tests: port.h's words for it. A GPU thread is a fiber; it runs until it waits at a
// barrier or a shuffle, and who runs next is drawn from a seed: what comes out for every seed is not a matter of luck.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifndef GPTCORE_WARP
#define GPTCORE_WARP 32
#endif

namespace gptcore::gpu {

constexpr int kWarp = GPTCORE_WARP;

int thread_index();
int64_t block_index();
void sync();
uint32_t shuffle_from(uint32_t x, int lane);         // x of another lane of the warp, once all of them are here

inline uint32_t shuffle_xor(uint32_t x, int mask) { return shuffle_from(x, thread_index() % kWarp ^ mask); }
inline uint32_t shuffle_up(uint32_t x, int by) {
  const int lane = thread_index() % kWarp;
  return shuffle_from(x, lane < by ? lane : lane - by);
}
inline uint32_t atomic_add(uint32_t* to, uint32_t x) { return (*to += x) - x; }  // nobody runs between two waits
inline void atomic_add(uint64_t* to, uint64_t x) { *to += x; }
inline float times(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float plus(float a, float b) { return a + b; }
inline float fused(float a, float b, float c) { return float(double(a) * b + c); }  // the last bit may differ, rarely
struct Sixteen { unsigned char bytes[16]; };
inline Sixteen load16(const void* from) { Sixteen x; __builtin_memcpy(&x, from, 16); return x; }

using Body = void (*)(const void* args, void* shared);

// Every thread of every block runs the body, blocks in a drawn order. -> 0, or a code that error_text explains: threads
// that wait for others that never come, or a write beyond the shared memory, which is full of NaN when a block begins.
int run(int64_t n_block, int n_thread, size_t n_shared, Body body, const void* args);
void set_seed(uint64_t seed);
const char* error_text(int code);
inline int n_processors() { return 4; }

template <class Kernel, class Args>
int launch(int64_t n_block, const Args& args, void*) {
  const Body body = [](const void* args, void* shared) {
    Kernel::body(*static_cast<const Args*>(args), *static_cast<typename Kernel::Shared*>(shared));
  };
  return run(n_block, Kernel::kThreads, sizeof(typename Kernel::Shared), body, &args);
}

}  // namespace gptcore::gpu
