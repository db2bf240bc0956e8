// The emulator's fibers, and a door for the tests, which build this file by itself and call it through ctypes:
// c++ -O2 -std=c++17 -shared -fPIC -ffp-contract=off -U_FORTIFY_SOURCE -DGPTCORE_WARP=64 csrc/emu/emulator.cpp
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "../gpu/launch.cu"  // the kernels and the launches themselves: the very same text that becomes GPU code

namespace gptcore::gpu {
namespace {

constexpr size_t kStack = 1 << 16, kGuard = 256;
constexpr unsigned char kPoison = 0xff;  // of floats: NaN

enum class State { ready, at_barrier, at_shuffle, ended };

struct Fiber {
  ucontext_t start;
  jmp_buf place;  // swapcontext would ask the system to change the signal mask every time: longjmp is 20 times faster
  State state;
  int parity;
  bool started;
};

struct Warp {
  uint32_t given[2][kWarp];  // in turn: some lanes may give again before others have read
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> stacks;
  jmp_buf scheduler;
  ucontext_t back;
  Body body;
  const void* args;
  void* shared;
  int64_t block;
  int current;
  uint64_t random = 1;
  std::string trouble;
} machine;

uint64_t next_random() {  // xorshift64*, Vigna 2016
  uint64_t& x = machine.random;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return x * 0x2545F4914F6CDD1Du;
}

template <class Items>
void shuffle_all(Items& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
}

void live() {
  machine.body(machine.args, machine.shared);
  machine.fibers[size_t(machine.current)].state = State::ended;
  _longjmp(machine.scheduler, 1);
}

void resume(int index) {
  Fiber& fiber = machine.fibers[size_t(index)];
  machine.current = index;
  if (_setjmp(machine.scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void wait(State state) {
  Fiber& fiber = machine.fibers[size_t(machine.current)];
  fiber.state = state;
  if (!_setjmp(fiber.place)) _longjmp(machine.scheduler, 1);
}

bool all_in(size_t first, size_t last, State state) {
  for (size_t i = first; i < last; ++i)
    if (machine.fibers[i].state != state) return false;
  return true;
}

// Lets go who has waited long enough; false if nobody can go on.
bool release() {
  const size_t n = machine.fibers.size();
  const auto let_go = [](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) machine.fibers[i].state = State::ready;
  };
  bool any = false;
  if (all_in(0, n, State::at_barrier)) let_go(0, n), any = true;
  for (size_t i = 0; i < n; i += kWarp)
    if (all_in(i, i + kWarp, State::at_shuffle)) let_go(i, i + kWarp), any = true;
  for (const Fiber& fiber : machine.fibers) any = any || fiber.state == State::ready;
  return any;
}

bool run_block() {
  for (size_t i = 0; i < machine.fibers.size(); ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.state = State::ready, fiber.parity = 0, fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack = {machine.stacks.get() + i * kStack, 0, kStack};
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, live, 0);
  }
  std::vector<int> order(machine.fibers.size());
  std::iota(order.begin(), order.end(), 0);
  do {
    const uint64_t resting = next_random();  // a quarter of the warps falls behind
    shuffle_all(order);
    for (int i : order)
      if (machine.fibers[size_t(i)].state == State::ready && (resting >> (i / kWarp * 2 % 64) & 3)) resume(i);
  } while (release());
  if (all_in(0, machine.fibers.size(), State::ended)) return true;
  int n[4] = {};
  for (const Fiber& fiber : machine.fibers) ++n[int(fiber.state)];
  machine.trouble = "block " + std::to_string(machine.block) + ": " + std::to_string(n[1]) + " threads wait at a barrier and " +
                    std::to_string(n[2]) + " in a shuffle for others that never come; " + std::to_string(n[3]) + " have ended";
  return false;
}

}  // namespace

int thread_index() { return machine.current; }
int64_t block_index() { return machine.block; }
void sync() { wait(State::at_barrier); }

uint32_t shuffle_from(uint32_t x, int lane) {
  const int me = machine.current;
  Fiber& fiber = machine.fibers[size_t(me)];
  uint32_t* given = machine.warps[size_t(me / kWarp)].given[fiber.parity ^= 1];
  given[me % kWarp] = x;
  wait(State::at_shuffle);
  return given[lane];
}

int run(int64_t n_block, int n_thread, size_t n_shared, Body body, const void* args) {
  if (machine.fibers.size() != size_t(n_thread)) {
    machine.fibers.assign(size_t(n_thread), {}), machine.warps.assign(size_t(n_thread / kWarp), {});
    machine.stacks.reset(new char[size_t(n_thread) * kStack]);
  }
  const std::unique_ptr<unsigned char[]> shared(new unsigned char[n_shared + kGuard]);
  machine.body = body, machine.args = args, machine.shared = shared.get();
  std::vector<int64_t> blocks(static_cast<size_t>(n_block));
  std::iota(blocks.begin(), blocks.end(), 0);
  shuffle_all(blocks);
  for (int64_t block : blocks) {
    machine.block = block;
    std::memset(shared.get(), kPoison, n_shared + kGuard);
    if (!run_block()) return 1;
    for (size_t i = n_shared; i < n_shared + kGuard; ++i) {
      if (shared[i] == kPoison) continue;
      machine.trouble = "block " + std::to_string(block) + ": wrote beyond its shared memory";
      return 1;
    }
  }
  return 0;
}

void set_seed(uint64_t seed) { machine.random = seed * 2 + 1; }
const char* error_text(int code) { return code ? machine.trouble.c_str() : ""; }

// ------------------------------------------------------------------------------------ kernels that must be found wrong

struct Divergent {  // half of the threads never come to the barrier
  static constexpr int kThreads = 64;
  struct Shared {};
  static void body(const int&, Shared&) {
    if (thread_index() < 32) sync();
  }
};

struct Overrun {
  static constexpr int kThreads = 64;
  struct Shared { int x[2]; };
  static void body(const int&, Shared& s) { s.x[2 + thread_index() % 2] = 0; }
};

struct Racing {  // the neighbour's number, without a barrier between writing and reading
  static constexpr int kThreads = 64;
  struct Shared { int x[64]; };
  static void body(int* const& out, Shared& s) {
    s.x[thread_index()] = thread_index();
    out[thread_index()] = s.x[(thread_index() + 1) % 64];
  }
};

}  // namespace gptcore::gpu

extern "C" {

// pointers: z, q, k, v, k_cache, v_cache, length, slopes, cos, sin. numbers: the strides of q, k, v, k_cache, v_cache
// (row, head, position), then n_row, n_head, n_kv_head, n_new, d_head, window, n_keys, dtype, cache_dtype, n_processor,
// half, interleaved. factors: scale, softcap. -> how many floats of partial results there were, or -1.
int64_t gptcore_emu_attention(void* const* pointers, const int64_t* numbers, const double* factors, uint64_t seed) {
  using namespace gptcore;
  Attention a = {};
  a.z = pointers[0], a.q = pointers[1], a.k = pointers[2], a.v = pointers[3], a.k_cache = pointers[4], a.v_cache = pointers[5];
  a.length = static_cast<const int64_t*>(pointers[6]), a.slopes = static_cast<const float*>(pointers[7]);
  a.cos = static_cast<const float*>(pointers[8]), a.sin = static_cast<const float*>(pointers[9]);
  for (int64_t* stride : {a.q_stride, a.k_stride, a.v_stride, a.k_cache_stride, a.v_cache_stride})
    for (int i = 0; i < 3; ++i) stride[i] = *numbers++;
  a.n_row = numbers[0], a.n_head = numbers[1], a.n_kv_head = numbers[2], a.n_new = numbers[3], a.d_head = numbers[4];
  a.window = numbers[5], a.dtype = Dtype(numbers[7]), a.cache_dtype = Dtype(numbers[8]);
  a.half = numbers[10], a.interleaved = numbers[11];
  a.scale = float(factors[0]), a.softcap = float(factors[1]);
  gpu::AttentionArgs args = gpu::plan_attention(a, numbers[6]);
  const int64_t n = gpu::partial_floats(args, numbers[9]);
  std::vector<float> partials(static_cast<size_t>(n), gpu::kInfinity - gpu::kInfinity);
  args.partials = n ? partials.data() : nullptr;
  gpu::set_seed(seed);
  return gptcore_gpu_attention(&args, nullptr) ? -1 : n;
}

// pointers: tokens, logits, seed, position. numbers: n_row, n_vocab, stride of logits, top_k, dtype, threads of a block.
// factors: top_p, min_p, 1 / temperature or 0.
int gptcore_emu_sample(void* const* pointers, const int64_t* numbers, const double* factors, uint64_t seed) {
  using namespace gptcore;
  const Sampling settings = {
      static_cast<int64_t*>(pointers[0]), pointers[1], static_cast<const int64_t*>(pointers[2]),
      static_cast<const int64_t*>(pointers[3]), numbers[2], 1, 1, numbers[1], numbers[3], factors[0], factors[1],
      float(factors[2]), Dtype(numbers[4])};
  gpu::set_seed(seed);
  if (numbers[5] != 1024) return gpu::sample<256>({settings, numbers[0]}, nullptr);
  return gptcore_gpu_sample(&settings, numbers[0], nullptr);
}

// 0: a barrier that some never reach, 1: a write beyond shared memory, 2: out[t] = t + 1 by a race.
int gptcore_emu_wrong(int which, int* out, uint64_t seed) {
  using namespace gptcore::gpu;
  set_seed(seed);
  if (which == 0) return launch<Divergent>(1, 0, nullptr);
  if (which == 1) return launch<Overrun>(1, 0, nullptr);
  return launch<Racing>(1, out, nullptr);
}

}
