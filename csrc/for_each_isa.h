// Compiles the file that MVD_KERNELS names once per instruction set, as mvd::portable, mvd::avx2 and mvd::avx512, and
// gives MVD_DISPATCH(kernel)(arguments...), which calls the one for this processor. The file uses simd.h's vectors and
// includes nothing but tiles.h; neither has an include guard. Use, in one .cpp per operator:
//
//   #define MVD_KERNELS "add_layer_norm_kernels.h"
//   #include "for_each_isa.h"
//   ... at::parallel_for(..., [&](int64_t begin, int64_t end) { MVD_DISPATCH(rows)(x, begin, end); });
#include "cpu_features.h"
#include "simd_types.h"

namespace mvd::portable {
#include "simd.h"
#include MVD_KERNELS
}  // namespace mvd::portable

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define MVD_ISA_AVX2
namespace mvd::avx2 {
#include "simd.h"
#include MVD_KERNELS
}  // namespace mvd::avx2
#undef MVD_ISA_AVX2
#pragma GCC pop_options

#pragma GCC push_options
#if !defined(MVD_EMULATE_AVX512)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#endif
#define MVD_ISA_AVX512
namespace mvd::avx512 {
#include "simd.h"
#include MVD_KERNELS
}  // namespace mvd::avx512
#undef MVD_ISA_AVX512
#pragma GCC pop_options

// Variadic, as the name of a template's instance may hold commas.
#define MVD_DISPATCH(...)                                    \
  (mvd::isa() == mvd::Isa::avx512 ? mvd::avx512::__VA_ARGS__ \
   : mvd::isa() == mvd::Isa::avx2 ? mvd::avx2::__VA_ARGS__   \
                                  : mvd::portable::__VA_ARGS__)
#else
#define MVD_DISPATCH(...) (mvd::portable::__VA_ARGS__)
#endif
