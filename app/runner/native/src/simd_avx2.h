/* x86-64-v3 (AVX2 + FMA): 8 lanes; bf16 products are two fused multiply-adds on widened halves.
 *
 * The same functions as simd_avx512.h, slower, with bits of their own. */
#ifndef HW_SIMD_H
#define HW_SIMD_H
#include <immintrin.h>
#include <stdint.h>

#define VL 8
#define MR_MAX 4 /* 4 x 2 accumulators + 2 x 2 widened weights + 2 broadcasts = 14 of 16 registers */
#define NV_MAX 2

#define BLOCKS_NV 2 /* the same for weights in blocks, which take two sums a result */
#define BLOCKS_NV_OF(mr) ((mr) > 2 ? 1 : 2)

typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vm;

#define INLINE static inline __attribute__((always_inline))

INLINE vf v_zero(void) { return _mm256_setzero_ps(); }
INLINE vf v_set1(float a) { return _mm256_set1_ps(a); }
INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf v_scale2(vf a, vf n) {
    vi power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(power));
}
INLINE vm v_first(int n) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
}
INLINE vm v_greater(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
INLINE vm v_at_least(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
INLINE unsigned v_bits(vm m) { return (unsigned)_mm256_movemask_ps(m); }
INLINE vf v_select(vm m, vf yes, vf no) { return _mm256_blendv_ps(no, yes, m); }
INLINE vi vi_set1(int a) { return _mm256_set1_epi32(a); }
INLINE vi vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE void vi_store(void *p, vi a) { _mm256_storeu_si256((__m256i *)p, a); }
INLINE vi vi_select(vm m, vi yes, vi no) {
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(no), _mm256_castsi256_ps(yes), m));
}
INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
INLINE vi vi_shift_left16(vi a) { return _mm256_slli_epi32(a, 16); }

INLINE float v_sum(vf a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
INLINE float v_largest(vf a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
}

typedef struct { __m256d low, high; } vd;
INLINE vd vd_zero(void) { return (vd){_mm256_setzero_pd(), _mm256_setzero_pd()}; }
INLINE vd vd_add(vd a, vf b) {
    a.low = _mm256_add_pd(a.low, _mm256_cvtps_pd(_mm256_castps256_ps128(b)));
    a.high = _mm256_add_pd(a.high, _mm256_cvtps_pd(_mm256_extractf128_ps(b, 1)));
    return a;
}
INLINE double vd_sum(vd a) {
    __m256d b = _mm256_add_pd(a.low, a.high);
    __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return _mm_cvtsd_f64(_mm_add_sd(c, _mm_unpackhi_pd(c, c)));
}

INLINE vf v_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
/* Round to nearest even; a NaN stays one. */
INLINE vi v_to_bf16_lanes(vf a) {
    vi bits = _mm256_castps_si256(a);
    vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    vi rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    vm nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
    return vi_select(nan, _mm256_set1_epi32(0x7fc0), rounded);
}
INLINE void v_store_bf16(uint16_t *p, vf a) {
    vi lanes = v_to_bf16_lanes(a);
    __m128i low = _mm256_castsi256_si128(lanes), high = _mm256_extracti128_si256(lanes, 1);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(low, high));
}

INLINE vf low_half(vi pair) { return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)); }
INLINE vf high_half(vi pair) { return _mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32((int)0xffff0000))); }
INLINE vf v_dp(vf acc, vi w, vi x) {
    return _mm256_fmadd_ps(high_half(w), high_half(x), _mm256_fmadd_ps(low_half(w), low_half(x), acc));
}
/* vpmaddubsw would saturate: widen to 16 bits, even and odd bytes apart, and add exactly. */
INLINE vi vi_dp(vi acc, vi x_u8, vi w_s8) {
    vi x_even = _mm256_and_si256(x_u8, _mm256_set1_epi16(0xff)), x_odd = _mm256_srli_epi16(x_u8, 8);
    vi w_even = _mm256_srai_epi16(_mm256_slli_epi16(w_s8, 8), 8), w_odd = _mm256_srai_epi16(w_s8, 8);
    vi sum = _mm256_add_epi32(_mm256_madd_epi16(x_even, w_even), _mm256_madd_epi16(x_odd, w_odd));
    return _mm256_add_epi32(acc, sum);
}
INLINE vf vi_to_float(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
INLINE void vi_store_low_bytes(uint8_t *p, vi i) { /* each lane in 0..255 */
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(words, words));
}
INLINE void v_store_u8(uint8_t *p, vf a) {
    vi_store_low_bytes(p, _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(128)));
}
INLINE void v_store_s8(int8_t *p, vf a) {
    vi_store_low_bytes((uint8_t *)p, _mm256_and_si256(_mm256_cvtps_epi32(a), _mm256_set1_epi32(255)));
}
INLINE void v_store_u16_halves(uint8_t *high, uint8_t *low, vf a) {
    vi i = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(32768));
    vi_store_low_bytes(high, _mm256_and_si256(_mm256_srli_epi32(i, 8), _mm256_set1_epi32(255)));
    vi_store_low_bytes(low, _mm256_and_si256(i, _mm256_set1_epi32(255)));
}

INLINE vf v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE float f16_to_float(uint16_t a) { return _cvtsh_ss(a); }
INLINE uint16_t float_to_f16(float a) { return _cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT); }
INLINE vi vi_low_nibbles(vi a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
INLINE vi vi_high_nibbles(vi a) { return _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(15)); }
/* Eight pairs of products of 15 x 127 fit into 16 bits. GCC would add them as a tree, and spill. */
INLINE vi nibbles_dp(vi acc, vi w, vi x) {
    acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x));
    __asm__("" : "+x"(acc));
    return acc;
}
INLINE vi nibbles_sum(vi acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
#endif
