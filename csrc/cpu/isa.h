// The CPU's kernels, one table an instruction set, one of them chosen when the library loads.
#pragma once
#include "../kernels/types.h"
#include "team.h"

namespace gptcore {

struct Isa {
  const char* name;
  void (*append_)(const Attention& a, int64_t first, int64_t last);              // pairs of row and key head
  int64_t (*attend_units)(const Attention& a);                                   // how many pieces attend makes
  void (*attend)(const Attention& a, int64_t first, int64_t last);               // pieces: whole queries
  size_t (*partial_bytes)(const Attention& a);                                   // what the next two share
  void (*attend_partial)(const Attention& a, void* partials, int64_t first, int64_t last);   // pieces times blocks
  void (*attend_merge)(const Attention& a, const void* partials, int64_t first, int64_t last);  // pieces
  void (*sample)(const Sampling& s, int64_t first, int64_t last);                // rows
  int64_t (*decode_floats)(const Decode& d, int n_thread);                       // what d.memory must hold
  size_t (*decode_scratch)(const Decode& d);                                     // and every thread's scratch
  void (*decode)(const Decode& d, Team& team, int thread, int n_thread);         // one thread's part of all of it
  void (*weigh)(const Weighing& w, int64_t first, int64_t last);                 // rows
};

const Isa* generic();
const Isa* avx2();    // null where the machine lacks it, or where it was not built
const Isa* avx512();
const Isa* neon();

const Isa* const* all_isas();         // those that this machine can run, best first, ended by null
const Isa& isa();                     // the one in use: the best, unless set_isa says otherwise
bool set_isa(const char* name);       // false: this machine has none of that name

void* scratch(size_t n_bytes);        // this thread's own memory, 64-byte aligned, kept for the next call

}  // namespace gptcore
