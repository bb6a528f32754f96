// One portable binary that uses wide vectors where the processor has them: the compiler makes a function once per
// instruction set and the loader picks. The sets leave fused multiply-add out and the build turns contraction off,
// so every set gives the same bits. Everything called is inlined (flatten), else it would be compiled once, for the
// default set.
#pragma once

#ifdef BT_HAVE_TARGET_CLONES
#define BT_TARGET_CLONES __attribute__((flatten, target_clones("avx512f", "avx2", "default")))
#else
#define BT_TARGET_CLONES
#endif
