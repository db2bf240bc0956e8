// What decode_ is told: the names of its numbers and weights, in their order. Python fills them by name.
#pragma once
#include <string>
#include <vector>

#include "../kernels/types.h"

namespace gptcore {

struct PlanField { const char* name; int64_t Shape::*field; };
struct ConstantField { const char* name; double Shape::*field; };

constexpr PlanField kPlan[] = {
    {"n_vocab", &Shape::n_vocab}, {"n_context", &Shape::n_context}, {"n_layer", &Shape::n_layer}, {"d_model", &Shape::d_model},
    {"n_head", &Shape::n_head}, {"n_kv_head", &Shape::n_kv_head}, {"d_head", &Shape::d_head}, {"d_ff", &Shape::d_ff},
    {"d_rot", &Shape::d_rot}, {"rope_interleaved", &Shape::rope_interleaved}, {"window", &Shape::window},
    {"norm", &Shape::norm}, {"mlp", &Shape::mlp}, {"block", &Shape::block},
};

constexpr ConstantField kConstants[] = {
    {"norm_eps", &Shape::norm_eps}, {"embed_scale", &Shape::embed_scale}, {"score_softcap", &Shape::score_softcap},
    {"logit_softcap", &Shape::logit_softcap},
};

// One leaf: three tensors w, b, scale follow each other in the list of weights. n_out 0: a gain or a table of n_in numbers.
template <class Owner>
struct LeafField {
  const char* name;
  Leaf Owner::*leaf;
  int64_t n_out, n_in;
  bool needed;
};

std::vector<LeafField<Decode>> model_leaves(const Shape& shape);  // once
std::vector<LeafField<Layer>> block_leaves(const Shape& shape);   // for every layer, after those

inline int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }

}  // namespace gptcore
