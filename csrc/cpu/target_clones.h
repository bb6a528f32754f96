// Makes one portable binary that uses wide vectors where the processor has them: the compiler makes a function once per
// instruction set and the loader selects one. The sets exclude fused multiply-add and the build disables contraction,
// so all sets give the same bits. Called functions are inlined (flatten); otherwise they would be compiled only for the
// default set.
#pragma once

#ifdef BT_HAVE_TARGET_CLONES
#define BT_TARGET_CLONES __attribute__((flatten, target_clones("avx512f", "avx2", "default")))
#else
#define BT_TARGET_CLONES
#endif
