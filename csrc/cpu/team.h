// A few threads that work on one call and end with it: nothing spins between calls, and nothing has to survive a fork.
#pragma once
#include <atomic>
#include <cstddef>

namespace gptcore {

class Team {
 public:
  // work(context, team, thread, n_thread) on up to `wanted` threads, the caller being thread 0; returns when all are
  // done. Where the system refuses a thread, or its n_scratch bytes of scratch, the team is smaller.
  static void run(int wanted, size_t n_scratch, void (*work)(const void*, Team&, int, int), const void* context);

  // Everybody waits here until the last one has come; what was written before is seen after.
  void meet();

 private:
  int n_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

int n_cpu();  // how many CPUs this process may use

}  // namespace gptcore
