// What the operators call: pointers on the device and a stream go in, an error number comes out (0: none). Nothing waits
// for the device, nothing is allocated. launch.cu becomes this for a GPU, and for the emulator.
#pragma once
#include "plan.h"

extern "C" {

int gptcore_gpu_sample(const gptcore::Sampling* settings, int64_t n_row, void* stream);
int gptcore_gpu_attention(const gptcore::gpu::AttentionArgs* args, void* stream);  // args as plan_attention makes them
int gptcore_gpu_processors();                                                      // of the current device
const char* gptcore_gpu_error(int code);

}
