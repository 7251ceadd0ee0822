/* x86-64-v4 + avx512bf16 + avx512vnni: 16 lanes, one instruction a dot-product step.
 *
 * Every function here is one fixed sequence of operations: the bits of a lane depend on nothing but
 * its inputs. Fused multiply-add happens where v_fma or v_dp says so and nowhere else (the build
 * passes -ffp-contract=off). */
#ifndef HW_SIMD_H
#define HW_SIMD_H
#include <immintrin.h>
#include <stdint.h>

#define VL 16     /* float lanes of a vector */
#define MR_MAX 6  /* rows of the largest register tile: 6 x 4 accumulators + 4 weights + 1 broadcast */
#define NV_MAX 4  /* vectors across a tile */

#define BLOCKS_NV 2         /* the same for weights in blocks, which take two sums a result */
#define BLOCKS_NV_OF(mr) 2

typedef __m512 vf;
typedef __m512i vi;
typedef __mmask16 vm;

#define INLINE static inline __attribute__((always_inline))

INLINE vf v_zero(void) { return _mm512_setzero_ps(); }
INLINE vf v_set1(float a) { return _mm512_set1_ps(a); }
INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
/* The second operand wins where one is NaN: v_max(limit, x) passes a NaN in x on. */
INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf v_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf v_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* a * 2^n for whole n in -126..126. */
INLINE vf v_scale2(vf a, vf n) { return _mm512_scalef_ps(a, n); }
/* Lanes whose index is below n. */
INLINE vm v_first(int n) { return n >= VL ? 0xffff : n <= 0 ? 0 : (vm)((1u << n) - 1); }
INLINE vm v_greater(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
INLINE vm v_at_least(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
/* A bit a lane, the first lane lowest. */
INLINE unsigned v_bits(vm m) { return m; }
INLINE vf v_select(vm m, vf yes, vf no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE vi vi_set1(int a) { return _mm512_set1_epi32(a); }
INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
INLINE vi vi_select(vm m, vi yes, vi no) { return _mm512_mask_blend_epi32(m, no, yes); }
INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
INLINE vi vi_shift_left16(vi a) { return _mm512_slli_epi32(a, 16); }

INLINE float half_sum(__m256 a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
INLINE float v_sum(vf a) {
    return half_sum(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
INLINE float v_largest(vf a) { return _mm512_reduce_max_ps(a); }

/* Sums in double precision, two lanes of which share one of floats. */
typedef struct { __m512d low, high; } vd;
INLINE vd vd_zero(void) { return (vd){_mm512_setzero_pd(), _mm512_setzero_pd()}; }
INLINE vd vd_add(vd a, vf b) {
    a.low = _mm512_add_pd(a.low, _mm512_cvtps_pd(_mm512_castps512_ps256(b)));
    a.high = _mm512_add_pd(a.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(b, 1)));
    return a;
}
INLINE double vd_sum(vd a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.low, a.high)); }

INLINE vf v_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE void v_store_bf16(uint16_t *p, vf a) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(a)); }
/* The bf16 bits of a, one in the low half of each 32-bit lane. */
INLINE vi v_to_bf16_lanes(vf a) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a)); }

/* acc + w.even * x.even + w.odd * x.odd, lanes being pairs of bf16. */
INLINE vf v_dp(vf acc, vi w, vi x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
/* acc + four products of unsigned x with signed w, exact in 32 bits. */
INLINE vi vi_dp(vi acc, vi x_u8, vi w_s8) { return _mm512_dpbusd_epi32(acc, x_u8, w_s8); }
INLINE vf vi_to_float(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
/* Round, add 128 and keep a byte a lane: |a| <= 127. */
INLINE void v_store_u8(uint8_t *p, vf a) {
    vi i = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(128));
    _mm_storeu_si128((__m128i *)p, _mm512_cvtusepi32_epi8(i));
}
/* Round and keep a byte a lane: |a| <= 127. */
INLINE void v_store_s8(int8_t *p, vf a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a))); }
/* Round, add 32768, keep the high and the low byte of a lane: |a| <= 32767. */
INLINE void v_store_u16_halves(uint8_t *high, uint8_t *low, vf a) {
    vi i = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(32768));
    _mm_storeu_si128((__m128i *)high, _mm512_cvtepi32_epi8(_mm512_srli_epi32(i, 8)));
    _mm_storeu_si128((__m128i *)low, _mm512_cvtepi32_epi8(i));
}

INLINE vf v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE float f16_to_float(uint16_t a) { return _cvtsh_ss(a); }
INLINE uint16_t float_to_f16(float a) { return _cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT); }
INLINE vi vi_low_nibbles(vi a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE vi vi_high_nibbles(vi a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
/* acc + products of w in 0..15 with signed x; after at most 8 of them, nibbles_sum gives 32-bit sums. */
INLINE vi nibbles_dp(vi acc, vi w, vi x) { return _mm512_dpbusd_epi32(acc, w, x); }
INLINE vi nibbles_sum(vi acc) { return acc; }
#endif
