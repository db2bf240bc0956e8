// Threads and their barrier. Waiting is a short pause and then yield: on a CPU of one's own the pause is all it takes, and
// where two threads share a CPU only yielding lets the other one come.
#include "team.h"

#include <exception>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "isa.h"

namespace gptcore {

constexpr int kPauses = 256;  // more starves a thread that shares its waiter's CPU, fewer costs where it does not

static void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Done>
static void wait_until(Done done) {
  for (int i = 0; !done(); ++i)
    if (i < kPauses) pause();
    else std::this_thread::yield();
}

void Team::meet() {
  if (n_ == 1) return;
  const unsigned round = round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    round_.store(round + 1, std::memory_order_release);
  } else {
    wait_until([&] { return round_.load(std::memory_order_acquire) != round; });
  }
}

static bool has_scratch(size_t n_bytes) {
  try {
    scratch(n_bytes);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

void Team::run(int wanted, size_t n_scratch, void (*work)(const void*, Team&, int, int), const void* context) {
  scratch(n_scratch);  // the caller's own failure is an error
  Team team;
  std::atomic<int> n_seen{0}, n_ready{0};
  std::atomic<bool> open{false};
  const auto join = [&] {
    const bool fit = has_scratch(n_scratch);
    const int thread = fit ? 1 + n_ready.fetch_add(1) : 0;
    n_seen.fetch_add(1, std::memory_order_release);
    if (!fit) return;
    wait_until([&] { return open.load(std::memory_order_acquire); });
    work(context, team, thread, team.n_);
  };
  std::vector<std::thread> threads;
  threads.reserve(size_t(wanted > 1 ? wanted - 1 : 0));
  try {
    for (int i = 1; i < wanted; ++i) threads.emplace_back(join);
  } catch (const std::exception&) {
    // no thread, or no memory for one: the team is what was created
  }
  wait_until([&] { return n_seen.load(std::memory_order_acquire) == int(threads.size()); });
  team.n_ = 1 + n_ready.load();
  open.store(true, std::memory_order_release);
  work(context, team, 0, team.n_);
  for (std::thread& thread : threads) thread.join();
}

int n_cpu() {
#ifdef __linux__
  cpu_set_t cpus;
  if (!sched_getaffinity(0, sizeof cpus, &cpus)) return CPU_COUNT(&cpus);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? int(n) : 1;
}

}  // namespace gptcore
