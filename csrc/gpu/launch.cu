// The launches: which kernel for which type, how many blocks, in which order.
#include "launch.h"

#include "attention.h"
#include "sample.h"

namespace gptcore::gpu {

template <class T>
int attend(const AttentionArgs& args, void* stream) {
  const Attention& a = args.a;
  if (args.n_tile > 1) {
    if (const int error = launch<Append<T>>(a.n_row * a.n_kv_head, args, stream)) return error;
  }
  const int64_t n_block = n_tiles(args) * (args.partials ? a.n_block : 1);
  const int error = args.one ? launch<Attend<T, 1>>(n_block, args, stream) : launch<Attend<T, kTile>>(n_block, args, stream);
  if (error || !args.partials) return error;
  return launch<Combine>(a.n_row * a.n_head * a.n_new, args, stream);
}

// On a GPU a row has all threads that a block may have; the emulator is quicker with fewer.
template <int N>
int sample(const SampleArgs& args, void* stream) {
  if (args.s.dtype == Dtype::fp32) return launch<Sample<float, N>>(args.n_row, args, stream);
  if (args.s.dtype == Dtype::bf16) return launch<Sample<bf16, N>>(args.n_row, args, stream);
  return launch<Sample<fp16, N>>(args.n_row, args, stream);
}

}  // namespace gptcore::gpu

extern "C" {

int gptcore_gpu_sample(const gptcore::Sampling* settings, int64_t n_row, void* stream) {
  return n_row ? gptcore::gpu::sample<1024>({*settings, n_row}, stream) : 0;
}

int gptcore_gpu_attention(const gptcore::gpu::AttentionArgs* args, void* stream) {
  if (args->a.n_row == 0) return 0;
  if (args->a.cache_dtype == gptcore::Dtype::fp32) return gptcore::gpu::attend<float>(*args, stream);
  if (args->a.cache_dtype == gptcore::Dtype::bf16) return gptcore::gpu::attend<gptcore::bf16>(*args, stream);
  return gptcore::gpu::attend<gptcore::fp16>(*args, stream);
}

int gptcore_gpu_processors() { return gptcore::gpu::n_processors(); }

const char* gptcore_gpu_error(int code) { return gptcore::gpu::error_text(code); }

}
