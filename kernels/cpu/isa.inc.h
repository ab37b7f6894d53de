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

// Counts of tokens are unrolled, with an instance for each up to `most`. Under sanitizers one compiles for a second or
// more, and three have every path.
#ifdef FLUTE_SANITIZE
#define FLUTE_TOKENS(most) 3
#else
#define FLUTE_TOKENS(most) (most)
#endif
