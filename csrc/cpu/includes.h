// Everything that the kernels' bodies need: it must be included before an instruction set's region begins, because what
// is included inside it would be compiled for that instruction set, and the linker might hand it to everybody.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>

#include "isa.h"
