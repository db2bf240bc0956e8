#define TORCH_TARGET_VERSION 0x020a000000000000  // torch 2.10 and later: the stable ABI, and nothing else of torch
// The operators: every schema on one screen, the checks that guard memory, and who computes.  The only file with torch.
// Values are checked by gptcore/kernels.py; what is refused here would read or write out of bounds.
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/isa.h"
#include "cpu/plan.h"
#include "gpu/present.h"
#ifdef GPTCORE_GPU
#include <torch/csrc/stable/accelerator.h>

#include "gpu/launch.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

STABLE_TORCH_LIBRARY(gptcore, m) {
  m.def("sample(Tensor logits, *, Tensor seed, Tensor position, float temperature=1.0, int top_k=0, float top_p=1.0, "
        "float min_p=0.0) -> Tensor");
  m.def("kv_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor length, *, int n_keys, "
        "float? scale=None, Tensor? alibi_slopes=None, int window=0, float softcap=0.0, Tensor? cos=None, Tensor? sin=None, "
        "bool interleaved=False) -> Tensor");
  m.def("decode_(Tensor[] weights, int[] plan, float[] constants, Tensor tokens, Tensor(a!)[] k, Tensor(b!)[] v, Tensor length, *, "
        "Tensor seed, Tensor position, Tensor stop, int steps, float temperature=1.0, int top_k=0, float top_p=1.0, "
        "float min_p=0.0, int n_threads=0) -> (Tensor, Tensor)");
  m.def("weigh_(Tensor(a!) logits, Tensor targets, *, int n_vocab, float softcap=0.0) -> (Tensor, Tensor)");
}

namespace gptcore {
namespace {

// ------------------------------------------------------------------------------------------------------------- checks

std::string shape_of(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

void check_shape(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  bool same = x.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t n : shape) same = same && x.size(i++) == n;
  std::string wanted;
  for (int64_t n : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
  STD_TORCH_CHECK(same, name, ": expected (", wanted, "), got ", shape_of(x));
}

void check_cpu(const char* name, const Tensor& x) { STD_TORCH_CHECK(x.is_cpu(), name, ": expected a tensor on the CPU"); }

void check_int64(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, name, ": expected int64");
}

void check_last(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) < 2, name, ": expected a contiguous last axis");
}

Dtype dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::fp32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::fp16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
}

// ------------------------------------------------------------------------------------------------------------ threads

bool forked = false;  // the threads of torch's pool do not survive a fork: a child that waits for them waits forever
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

template <class Work>
void parallel(int64_t n, int64_t grain, const Work& work) {
  if (forked || n <= grain) {
    if (n > 0) work(0, n);
  } else {
    torch::stable::parallel_for(0, n, grain, work);
  }
}

// What computes on the CPU. Its twin is Gpu, below; the operators are the same text for both.
struct Cpu {
  Cpu(const char* name, const Tensor& x) { check(name, x); }
  void check(const char* name, const Tensor& x) const { check_cpu(name, x); }

  void sample(const Sampling& s, int64_t n_row) const {
    const Isa& use = isa();
    parallel(n_row, s.n_vocab < 4096 ? 4096 / s.n_vocab : 1, [&](int64_t first, int64_t last) { use.sample(s, first, last); });
  }

  void attend(Attention& a, int64_t n_keys, const Tensor&) const {
    int64_t longest = 0;
    for (int64_t b = 0; b < a.n_row; ++b) {
      STD_TORCH_CHECK(0 <= a.length[b] && a.length[b] <= n_keys - a.n_new, "length: expected 0 to ", n_keys - a.n_new, " in row ", b,
                      ", got ", a.length[b]);
      longest = a.length[b] > longest ? a.length[b] : longest;
    }
    a.n_block = (longest + a.n_new + kBlock - 1) / kBlock;
    const Isa& use = isa();
    constexpr int64_t kEnough = 1 << 16;  // multiplications that are worth another thread's waking up
    const int64_t n_piece = use.attend_units(a), n_pair = a.n_row * a.n_kv_head;
    parallel(n_pair, 1 + kEnough / (2 * a.n_new * a.d_head), [&](int64_t first, int64_t last) { use.append_(a, first, last); });
    const int64_t each = 2 * a.d_head * (longest + a.n_new) * (n_piece ? n_pair * (a.n_head / a.n_kv_head) * a.n_new / n_piece : 1);
    if (forked || n_piece >= int64_t(torch::stable::get_num_threads()) || a.n_block == 1 || each < kEnough) {
      parallel(n_piece, 1 + kEnough / each, [&](int64_t first, int64_t last) { use.attend(a, first, last); });
    } else {  // too few heads to go round: blocks of keys are shared out too, and merged in their order
      const std::unique_ptr<char[]> partials(new char[use.partial_bytes(a)]);
      parallel(n_piece * a.n_block, 1 + kEnough * a.n_block / each,
               [&](int64_t first, int64_t last) { use.attend_partial(a, partials.get(), first, last); });
      parallel(n_piece, n_piece, [&](int64_t first, int64_t last) { use.attend_merge(a, partials.get(), first, last); });
    }
  }
};

// ------------------------------------------------------------------------------------------------------------- sample

template <class Place>
Tensor sample(const Tensor logits, const Tensor seed, const Tensor position, double temperature, int64_t top_k, double top_p,
              double min_p) {
  const Place place("logits", logits);
  place.check("seed", seed), place.check("position", position);
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected (B, V), got ", shape_of(logits));
  const int64_t n_row = logits.size(0), n_vocab = logits.size(1);
  STD_TORCH_CHECK(0 < n_vocab && n_vocab <= kMaxVocab, "logits: expected 1 to ", kMaxVocab, " columns, got ", n_vocab);
  check_last("logits", logits);
  check_int64("seed", seed), check_int64("position", position);
  check_shape("seed", seed, {n_row}), check_shape("position", position, {n_row});
  Tensor tokens = torch::stable::new_empty(seed, {n_row}, ScalarType::Long);
  const Sampling s = {
      static_cast<int64_t*>(tokens.mutable_data_ptr()), logits.const_data_ptr(),
      static_cast<const int64_t*>(seed.const_data_ptr()), static_cast<const int64_t*>(position.const_data_ptr()),
      logits.stride(0), seed.stride(0), position.stride(0), n_vocab, top_k, top_p, min_p,
      temperature == 0 ? 0.0f : float(1.0 / temperature), dtype_of("logits", logits)};
  place.sample(s, n_row);
  return tokens;
}

// ------------------------------------------------------------------------------------------------------ kv_attention_

void take_strides(int64_t* to, const Tensor& x) {
  for (int i = 0; i < 3; ++i) to[i] = x.stride(i);
}

const float* floats_of(const char* name, const Tensor& x, std::initializer_list<int64_t> shape) {
  check_shape(name, x, shape);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), name, ": expected float32, contiguous");
  return static_cast<const float*>(x.const_data_ptr());
}

template <class Place>
Tensor kv_attention_(const Tensor q, const Tensor k, const Tensor v, Tensor k_cache, Tensor v_cache, const Tensor length,
                     int64_t n_keys, std::optional<double> scale, std::optional<Tensor> alibi_slopes, int64_t window,
                     double softcap, std::optional<Tensor> cos, std::optional<Tensor> sin, bool interleaved) {
  const Place place("q", q);
  place.check("k", k), place.check("v", v), place.check("k_cache", k_cache), place.check("v_cache", v_cache);
  place.check("length", length);
  Attention a = {};
  a.dtype = dtype_of("q", q), a.cache_dtype = dtype_of("k_cache", k_cache);
  STD_TORCH_CHECK(dtype_of("k", k) == a.dtype && dtype_of("v", v) == a.dtype, "k, v: expected the dtype of q");
  STD_TORCH_CHECK(dtype_of("v_cache", v_cache) == a.cache_dtype, "v_cache: expected the dtype of k_cache");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k_cache.dim() == 4, "q, k, k_cache: expected four axes, got ", shape_of(q), ", ",
                  shape_of(k), ", ", shape_of(k_cache));
  a.n_row = q.size(0), a.n_head = q.size(1), a.n_new = q.size(2), a.d_head = q.size(3), a.n_kv_head = k.size(1);
  const int64_t n_context = k_cache.size(2);
  STD_TORCH_CHECK(0 < a.d_head && a.d_head <= kMaxHead, "q: expected a head of 1 to ", kMaxHead, ", got ", a.d_head);
  STD_TORCH_CHECK(a.n_head > 0 && a.n_new > 0, "q: expected at least one head and one new token, got ", shape_of(q));
  STD_TORCH_CHECK(a.n_kv_head > 0 && a.n_head % a.n_kv_head == 0, "k: expected a number of heads that divides ", a.n_head, ", got ",
                  a.n_kv_head);
  check_shape("k", k, {a.n_row, a.n_kv_head, a.n_new, a.d_head}), check_shape("v", v, {a.n_row, a.n_kv_head, a.n_new, a.d_head});
  check_shape("k_cache", k_cache, {a.n_row, a.n_kv_head, n_context, a.d_head});
  check_shape("v_cache", v_cache, {a.n_row, a.n_kv_head, n_context, a.d_head});
  check_last("q", q), check_last("k", k), check_last("v", v), check_last("k_cache", k_cache), check_last("v_cache", v_cache);
  check_int64("length", length), check_shape("length", length, {a.n_row});
  STD_TORCH_CHECK(length.stride(0) == 1 || a.n_row < 2, "length: expected a contiguous tensor");
  STD_TORCH_CHECK(n_keys <= n_context, "n_keys: expected at most n_context=", n_context, ", got ", n_keys);
  STD_TORCH_CHECK(window >= 0, "window: expected at least 0, got ", window);
  if (alibi_slopes) {
    place.check("alibi_slopes", *alibi_slopes);
    a.slopes = floats_of("alibi_slopes", *alibi_slopes, {a.n_head});
  }
  STD_TORCH_CHECK(bool(cos) == bool(sin), "cos, sin: expected both or neither");
  if (cos) {
    a.half = cos->dim() ? cos->size(-1) : 0, a.interleaved = interleaved;
    STD_TORCH_CHECK(2 * a.half <= a.d_head, "cos: expected at most ", a.d_head / 2, " angles, got ", shape_of(*cos));
    place.check("cos", *cos), place.check("sin", *sin);
    a.cos = floats_of("cos", *cos, {a.n_row, a.n_new, 1, a.half}), a.sin = floats_of("sin", *sin, {a.n_row, a.n_new, 1, a.half});
  }
  Tensor z = torch::stable::new_empty(q, {a.n_row, a.n_head, a.n_new, a.d_head}, q.scalar_type());
  a.z = z.mutable_data_ptr(), a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.k_cache = k_cache.mutable_data_ptr(), a.v_cache = v_cache.mutable_data_ptr();
  a.length = static_cast<const int64_t*>(length.const_data_ptr());
  take_strides(a.q_stride, q), take_strides(a.k_stride, k), take_strides(a.v_stride, v);
  take_strides(a.k_cache_stride, k_cache), take_strides(a.v_cache_stride, v_cache);
  a.window = window, a.scale = scale ? float(*scale) : float(1.0 / std::sqrt(double(a.d_head))), a.softcap = float(softcap);
  place.attend(a, n_keys, q);
  return z;
}

// ------------------------------------------------------------------------------------------------------------ decode_

Shape shape_of(const std::vector<int64_t>& plan, const std::vector<double>& constants) {
  STD_TORCH_CHECK(plan.size() == std::size(kPlan), "plan: expected ", std::size(kPlan), " numbers, got ", plan.size());
  STD_TORCH_CHECK(constants.size() == std::size(kConstants), "constants: expected ", std::size(kConstants), " numbers, got ",
                  constants.size());
  Shape s = {};
  size_t i = 0;
  for (const PlanField& f : kPlan) {
    const int64_t value = plan[i++];
    STD_TORCH_CHECK(0 <= value && value < (int64_t(1) << 31), f.name, ": expected 0 to 2^31, got ", value);
    s.*f.field = value;
  }
  i = 0;
  for (const ConstantField& f : kConstants) s.*f.field = constants[i++];
  STD_TORCH_CHECK(s.n_vocab > 0 && s.n_vocab <= kMaxVocab && s.n_context > 0 && s.d_model > 0 && s.d_ff > 0,
                  "plan: expected 1 or more of n_vocab (to 2^22), n_context, d_model, d_ff");
  STD_TORCH_CHECK(0 < s.d_head && s.d_head <= kMaxHead && s.d_rot <= s.d_head && s.d_rot % 2 == 0,
                  "d_head, d_rot: expected a head of 1 to ", kMaxHead, " and an even part of it, got ", s.d_head, ", ", s.d_rot);
  STD_TORCH_CHECK(s.n_kv_head > 0 && s.n_head > 0 && s.n_head % s.n_kv_head == 0, "n_kv_head: expected a divisor of ", s.n_head,
                  ", got ", s.n_kv_head);
  return s;
}

Weights weights_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Weights::fp32;
    case ScalarType::BFloat16: return Weights::bf16;
    case ScalarType::Char: return Weights::int8;
    default: break;
  }
  STD_TORCH_CHECK(false, "weights: expected float32, bfloat16 or int8");
}

// The tensor's data if it holds at least n of the type, contiguous; null where it is empty and may be.
const void* data_of(const std::string& name, const Tensor& x, int64_t n, ScalarType type, bool needed) {
  if (x.numel() == 0 && !needed) return nullptr;
  check_cpu(name.c_str(), x);
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous(), name, ": expected a contiguous tensor of another type");
  STD_TORCH_CHECK(x.numel() >= n, name, ": expected ", n, " numbers, got ", x.numel());
  return x.const_data_ptr();
}

template <class Owner>
void read_leaves(Owner& owner, const std::vector<LeafField<Owner>>& fields, const std::string& prefix, const Tensor* weights,
                 ScalarType type) {
  for (const LeafField<Owner>& f : fields) {
    const std::string name = prefix + f.name;
    const bool matrix = f.n_out > 0;
    Leaf leaf = {};
    leaf.w = data_of(name + ".w", *weights++, matrix ? f.n_out * padded16(f.n_in) : f.n_in, matrix ? type : ScalarType::Float, f.needed);
    leaf.b = static_cast<const float*>(data_of(name + ".b", *weights++, matrix ? f.n_out : f.n_in, ScalarType::Float, false));
    const bool scaled = matrix && leaf.w && type == ScalarType::Char;
    leaf.scale = static_cast<const float*>(data_of(name + ".scale", *weights++, f.n_out, ScalarType::Float, scaled));
    owner.*f.leaf = leaf;
  }
}

void read_cache(Layer& layer, Tensor& k, Tensor& v, int64_t n_row, const Shape& s, Dtype dtype) {
  check_shape("k", k, {n_row, s.n_kv_head, s.n_context, s.d_head}), check_shape("v", v, {n_row, s.n_kv_head, s.n_context, s.d_head});
  check_cpu("k", k), check_cpu("v", v);
  STD_TORCH_CHECK(dtype_of("k", k) == dtype && dtype_of("v", v) == dtype, "k, v: expected one dtype in all layers");
  check_last("k", k), check_last("v", v);
  layer.k_cache = k.mutable_data_ptr(), layer.v_cache = v.mutable_data_ptr();
  take_strides(layer.k_stride, k), take_strides(layer.v_stride, v);
}

// A vector of int64 as decode reads it: contiguous, n long, or of any length if n is negative.
const int64_t* numbers_of(const char* name, const Tensor& x, int64_t n) {
  check_cpu(name, x), check_int64(name, x);
  STD_TORCH_CHECK(x.dim() == 1 && (n < 0 || x.size(0) == n) && x.is_contiguous(), name, ": expected (", n, "), contiguous, got ",
                  shape_of(x));
  return static_cast<const int64_t*>(x.const_data_ptr());
}

std::tuple<Tensor, Tensor> decode_cpu_(std::vector<Tensor> weights, std::vector<int64_t> plan, std::vector<double> constants,
                                       const Tensor tokens, std::vector<Tensor> k, std::vector<Tensor> v, const Tensor length,
                                       const Tensor seed, const Tensor position, const Tensor stop, int64_t steps,
                                       double temperature, int64_t top_k, double top_p, double min_p, int64_t n_threads) {
  Decode d = {};
  Shape& s = d.shape = shape_of(plan, constants);
  const auto once = model_leaves(s);
  const auto each = block_leaves(s);
  STD_TORCH_CHECK(weights.size() == 3 * (once.size() + s.n_layer * each.size()), "weights: expected ",
                  3 * (once.size() + s.n_layer * each.size()), " tensors, got ", weights.size());
  STD_TORCH_CHECK(int64_t(k.size()) == s.n_layer && int64_t(v.size()) == s.n_layer, "k, v: expected ", s.n_layer, " layers, got ",
                  k.size(), ", ", v.size());
  const ScalarType type = weights[0].scalar_type();
  d.weights = weights_of(weights[0]);
  read_leaves(d, once, "", weights.data(), type);
  d.n_row = tokens.dim() == 1 ? tokens.size(0) : -1;
  STD_TORCH_CHECK(d.n_row >= 0 && steps >= 0, "tokens, steps: expected (B) and 0 or more, got ", shape_of(tokens), ", ", steps);
  d.tokens = numbers_of("tokens", tokens, d.n_row), d.length = numbers_of("length", length, d.n_row);
  d.position = numbers_of("position", position, d.n_row), d.stop = numbers_of("stop", stop, -1);
  d.n_stop = stop.size(0), d.n_step = steps;
  d.cache_dtype = k.empty() ? Dtype::fp32 : dtype_of("k", k[0]);
  std::vector<Layer> layers(size_t(s.n_layer));
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string prefix = "blocks." + std::to_string(i) + ".";
    read_leaves(layers[i], each, prefix, weights.data() + 3 * (once.size() + i * each.size()), type);
    read_cache(layers[i], k[i], v[i], d.n_row, s, d.cache_dtype);
  }
  d.layers = layers.data();
  for (int64_t b = 0; b < d.n_row; ++b) {
    STD_TORCH_CHECK(0 <= d.tokens[b] && d.tokens[b] < s.n_vocab, "tokens: expected 0 to ", s.n_vocab - 1, " in row ", b, ", got ",
                    d.tokens[b]);
    STD_TORCH_CHECK(0 <= d.length[b] && d.length[b] <= s.n_context, "length: expected 0 to ", s.n_context, " in row ", b, ", got ",
                    d.length[b]);
  }
  Tensor drawn = torch::stable::new_empty(tokens, {d.n_row, steps}, ScalarType::Long);
  Tensor lengths = torch::stable::new_empty(tokens, {d.n_row}, ScalarType::Long);
  d.drawn = static_cast<int64_t*>(drawn.mutable_data_ptr()), d.new_length = static_cast<int64_t*>(lengths.mutable_data_ptr());
  std::fill_n(d.drawn, d.n_row * steps, -1);
  d.sampling = {nullptr, nullptr, numbers_of("seed", seed, d.n_row), nullptr, 0, 1, 1, s.n_vocab, top_k, top_p, min_p,
                temperature == 0 ? 0.0f : float(1.0 / temperature), Dtype::fp32};
  if (d.n_row == 0) return {drawn, lengths};

  const Isa& use = isa();
  const int64_t usual = std::min(int64_t(torch::stable::get_num_threads()), int64_t(n_cpu()));
  const int n_thread = int(std::min(n_threads > 0 ? n_threads : usual, int64_t(256)));  // asked for by number: as asked
  const size_t n_byte = (size_t(use.decode_floats(d, n_thread)) * sizeof(float) + 63) / 64 * 64;
  const std::unique_ptr<void, void (*)(void*)> memory(std::aligned_alloc(64, n_byte), std::free);
  if (!memory) throw std::bad_alloc();
  std::memset(memory.get(), 0, n_byte);
  d.memory = static_cast<float*>(memory.get());
  struct Job { const Decode& d; const Isa& use; } job = {d, use};
  Team::run(n_thread, use.decode_scratch(d), [](const void* context, Team& team, int thread, int n) {
    const Job& job = *static_cast<const Job*>(context);
    job.use.decode(job.d, team, thread, n);
  }, &job);
  return {drawn, lengths};
}

// ------------------------------------------------------------------------------------------------------------- weigh_

std::tuple<Tensor, Tensor> weigh_cpu_(Tensor logits, const Tensor targets, int64_t n_vocab, double softcap) {
  check_cpu("logits", logits), check_cpu("targets", targets), check_int64("targets", targets);
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected (N, V), got ", shape_of(logits));
  check_last("logits", logits);
  const int64_t n_row = logits.size(0);
  check_shape("targets", targets, {n_row});
  STD_TORCH_CHECK(targets.is_contiguous(), "targets: expected a contiguous tensor");
  STD_TORCH_CHECK(0 < n_vocab && n_vocab <= logits.size(1), "n_vocab: expected 1 to ", logits.size(1), ", got ", n_vocab);
  Weighing w = {};
  w.logits = logits.mutable_data_ptr(), w.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t i = 0; i < n_row; ++i)
    STD_TORCH_CHECK(0 <= w.targets[i] && w.targets[i] < n_vocab, "targets: expected 0 to ", n_vocab - 1, " in row ", i, ", got ",
                    w.targets[i]);
  Tensor sums = torch::stable::new_empty(logits, {n_row}, ScalarType::Float);
  Tensor nats = torch::stable::new_empty(logits, {n_row}, ScalarType::Float);
  w.sums = static_cast<float*>(sums.mutable_data_ptr()), w.nats = static_cast<float*>(nats.mutable_data_ptr());
  w.stride = logits.stride(0), w.n_vocab = n_vocab, w.n_padded = logits.size(1);
  w.softcap = float(softcap), w.dtype = dtype_of("logits", logits);
  const Isa& use = isa();
  parallel(n_row, n_vocab < 4096 ? 4096 / n_vocab : 1, [&](int64_t first, int64_t last) { use.weigh(w, first, last); });
  return {sums, nats};
}

}  // namespace
}  // namespace gptcore

STABLE_TORCH_LIBRARY_IMPL(gptcore, CPU, m) {
  m.impl("sample", TORCH_BOX(&gptcore::sample<gptcore::Cpu>));
  m.impl("kv_attention_", TORCH_BOX(&gptcore::kv_attention_<gptcore::Cpu>));
  m.impl("decode_", TORCH_BOX(&gptcore::decode_cpu_));
  m.impl("weigh_", TORCH_BOX(&gptcore::weigh_cpu_));
}

// ---------------------------------------------------------------------------------------------------------------- GPU

#ifdef GPTCORE_GPU  // built with a toolkit; whether torch has a GPU runtime is seen when the library is loaded

extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace gptcore {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check_launch(const char* op, int code) { STD_TORCH_CHECK(code == 0, op, ": ", gptcore_gpu_error(code)); }

// Everything of one call lies on one device, which becomes the current one. Nobody waits for what it computes.
struct Gpu {
  int32_t index;
  DeviceGuard guard;

  Gpu(const char* name, const Tensor& x) : index(on_gpu(name, x)), guard(index) {}

  static int32_t on_gpu(const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.is_cuda(), name, ": expected a tensor on a GPU");
    return x.get_device_index();
  }

  void check(const char* name, const Tensor& x) const {
    STD_TORCH_CHECK(on_gpu(name, x) == index, name, ": expected a tensor on GPU ", index, ", got GPU ", x.get_device_index());
  }

  void* stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(index, &stream) == 0,
                    "stream: expected a torch with a GPU runtime");
    return stream;
  }

  void sample(const Sampling& s, int64_t n_row) const { check_launch("sample", gptcore_gpu_sample(&s, n_row, stream())); }

  // A row that would not fit into n_keys is not written, and its z is NaN: its length is seen on the device only.
  void attend(const Attention& a, int64_t n_keys, const Tensor& q) const {
    gpu::AttentionArgs args = gpu::plan_attention(a, n_keys);
    const int64_t n_float = gpu::partial_floats(args, gptcore_gpu_processors());
    Tensor partials = torch::stable::new_empty(q, {n_float}, ScalarType::Float);
    args.partials = n_float ? static_cast<float*>(partials.mutable_data_ptr()) : nullptr;
    check_launch("kv_attention_", gptcore_gpu_attention(&args, stream()));
  }
};

}  // namespace

bool gpu_present() { return aoti_torch_get_current_cuda_stream != nullptr; }

}  // namespace gptcore

STABLE_TORCH_LIBRARY_IMPL(gptcore, CUDA, m) {  // which is ROCm's name too
  m.impl("sample", TORCH_BOX(&gptcore::sample<gptcore::Gpu>));
  m.impl("kv_attention_", TORCH_BOX(&gptcore::kv_attention_<gptcore::Gpu>));
}

#else

bool gptcore::gpu_present() { return false; }

#endif
