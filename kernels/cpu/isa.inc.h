// What every vector translation unit includes first. Standard templates stay out of these files: an instance with
// external linkage could be kept in a copy that only some CPUs can run (tests/no_shared_symbols.cmake checks).
#pragma once

#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <utility>

#include "flute.h"

#define INLINE inline __attribute__((always_inline))
