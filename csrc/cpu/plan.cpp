// The decoder's weights: which there are, how large, and which a model may lack.
#include "plan.h"

namespace gptcore {

std::vector<LeafField<Decode>> model_leaves(const Shape& s) {
  return {
      {"embed", &Decode::embed, s.n_vocab, s.d_model, true},
      {"positions", &Decode::positions, 0, s.n_context * padded16(s.d_model), false},
      {"cos", &Decode::cos, 0, s.n_context * s.d_rot / 2, s.d_rot > 0},
      {"sin", &Decode::sin, 0, s.n_context * s.d_rot / 2, s.d_rot > 0},
      {"slopes", &Decode::slopes, 0, s.n_head, false},
      {"norm_f", &Decode::norm_f, 0, padded16(s.d_model), true},
      {"head", &Decode::head, s.n_vocab, s.d_model, false},
  };
}

std::vector<LeafField<Layer>> block_leaves(const Shape& s) {
  const int64_t c = s.d_model, q = s.n_head * s.d_head, kv = s.n_kv_head * s.d_head;
  return {
      {"norm_1", &Layer::norm_1, 0, padded16(c), true},
      {"attn.q", &Layer::q, q, c, true},
      {"attn.k", &Layer::k, kv, c, true},
      {"attn.v", &Layer::v, kv, c, true},
      {"attn.q_norm", &Layer::q_norm, 0, padded16(s.d_head), false},
      {"attn.k_norm", &Layer::k_norm, 0, padded16(s.d_head), false},
      {"attn.o", &Layer::o, c, q, true},
      {"norm_2", &Layer::norm_2, 0, padded16(c), s.block != kParallelSharedNorm},
      {"mlp.gate", &Layer::gate, s.d_ff, c, s.mlp == kSwiglu},
      {"mlp.up", &Layer::up, s.d_ff, c, true},
      {"mlp.down", &Layer::down, c, s.d_ff, true},
  };
}

}  // namespace gptcore
