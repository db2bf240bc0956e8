// What kernels and launchers agree on: how numbers are stored, and the arguments of each kernel as one plain struct.
// Axes: B rows, T new tokens, S keys, H heads (H_kv for keys and values), D head width, V vocabulary. Strides count
// elements; the last axis is contiguous. No torch here: pointers and sizes only.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gptcore {

struct bf16 { uint16_t bits; };  // the upper half of a float
struct fp16 { uint16_t bits; };  // IEEE half precision

enum class Dtype { fp32, bf16, fp16 };

// One layer's append and attend.  q, z (B,H,T,D); k, v (B,H_kv,T,D); k_cache, v_cache (B,H_kv,n_context,D).
struct Attention {
  void* z;                       // contiguous, dtype
  const void *q, *k, *v;         // dtype
  void *k_cache, *v_cache;       // cache_dtype
  const int64_t* length;         // (B): positions that row b holds before the new ones
  const float* slopes;           // (H) or null: ALiBi
  const float *cos, *sin;        // (B,T,half), or null: queries and new keys come turned already
  int64_t q_stride[3], k_stride[3], v_stride[3], k_cache_stride[3], v_cache_stride[3];  // row, head, position
  int64_t n_row, n_head, n_kv_head, n_new, d_head;
  int64_t half, interleaved;     // pairs of a head that turn; a pair is (i, i + half), or (2i, 2i+1)
  int64_t window;                // 0: none
  int64_t n_block;               // blocks of keys that the longest row may see
  float scale, softcap;          // softcap 0: none
  Dtype dtype, cache_dtype;
};

// One draw a row.  logits (B,V) -> tokens (B); seed, position (B).
struct Sampling {
  int64_t* tokens;
  const void* logits;
  const int64_t *seed, *position;
  int64_t logits_stride, seed_stride, position_stride;
  int64_t n_vocab, top_k;        // top_k 0: no limit
  double top_p, min_p;
  float temperature_inverse;     // 1 / temperature rounded once; 0: the largest logit
  Dtype dtype;
};

// Rows of logits (N,n_padded) become e^(z - top), less their sum at the target, 0 from n_vocab on; targets, sums, nats (N).
struct Weighing {
  void* logits;
  const int64_t* targets;
  float *sums, *nats;            // of a row's e^(z - top); -log of the target's share of it
  int64_t stride, n_vocab, n_padded;
  float softcap;                 // z = softcap * tanh(logit / softcap); 0: none
  Dtype dtype;
};

// ------------------------------------------------------------------------------------------------------- the decoder

struct int8 { int8_t v; };       // a weight; its row has a scale

enum class Weights { fp32, bf16, int8 };

struct Shape {                   // ModelConfig's numbers, by its names
  int64_t n_vocab, n_context, n_layer, d_model, n_head, n_kv_head, d_head, d_ff, d_rot, rope_interleaved, window;
  int64_t norm, mlp, block;      // which of config.py's CHOICES, in their order
  double norm_eps, embed_scale, score_softcap, logit_softcap;
};

enum Norm { kLayernorm, kRmsnorm };
enum Mlp { kGelu, kGeluTanh, kRelu2, kSwiglu };
enum Block { kSequential, kParallel, kParallelSharedNorm };

// A matrix (n_out, n_in) or a norm's gain (n_in): rows are padded with zeros to a multiple of 16. Null: there is none.
struct Leaf {
  const void* w;                 // a matrix as Weights says; gains and tables are floats
  const float *b, *scale;        // (n_out); a norm's b is as long as its w
};

struct Layer {
  Leaf norm_1, q, k, v, o, q_norm, k_norm, norm_2, gate, up, down;
  void *k_cache, *v_cache;       // (B,H_kv,n_context,D)
  int64_t k_stride[3], v_stride[3];  // row, head, position
};

// Whole steps for B rows: embed a token, every layer, the head, a draw that is the next step's token.
struct Decode {
  Shape shape;
  Leaf embed, norm_f, head;      // head.w null: the embedding
  Leaf positions, cos, sin, slopes;  // tables (n_context, C), (n_context, d_rot / 2) twice, (H)
  const Layer* layers;
  Sampling sampling;             // settings and seeds; n_vocab
  const int64_t *tokens, *length, *position, *stop;  // (B) thrice; (n_stop)
  int64_t *drawn, *new_length;   // (B, n_step), -1 where nothing was drawn; (B)
  int64_t n_row, n_step, n_stop;
  float* memory;                 // decode_floats(...), zeros
  Weights weights;
  Dtype cache_dtype;
};

constexpr int64_t kBlock = 256;  // keys that are summed together; the order of summation depends on nothing else
constexpr int64_t kMaxHead = 256;
constexpr int64_t kMaxVocab = 1 << 22;  // weights are below 2^40 and sums below 2^63

}  // namespace gptcore
