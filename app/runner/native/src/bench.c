/* What the machine can do at most, for comparison: one thread, no memory, or nothing but memory. */
#include "vmath.h"

#define CHAINS 12 /* independent sums: enough to hide the latency of the instruction */

/* Dot-product steps on registers alone. Returns the operations done: 2 x 2 x VL a step in bf16. */
int64_t hw_peak_bf16(int64_t rounds, float *sink) {
    vf acc[CHAINS];
    vi w = vi_set1(0x3f803f80), x = vi_set1(0x3f003f00);
    for (int i = 0; i < CHAINS; i++) acc[i] = v_set1((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(w), "+v"(x));
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) acc[i] = v_dp(acc[i], w, x);
    }
    for (int i = 0; i < CHAINS; i++) v_store(sink + i * VL, acc[i]);
    return rounds * CHAINS * VL * 4;
}

int64_t hw_peak_int8(int64_t rounds, int32_t *sink) {
    vi acc[CHAINS];
    vi w = vi_set1(0x01010101), x = vi_set1(0x02020202);
    for (int i = 0; i < CHAINS; i++) acc[i] = vi_set1(i);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+v"(w), "+v"(x));
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) acc[i] = vi_dp(acc[i], x, w);
    }
    for (int i = 0; i < CHAINS; i++) vi_store(sink + i * VL, acc[i]);
    return rounds * CHAINS * VL * 8;
}

/* Read `count` floats once, a multiple of 8 vectors. */
float hw_read(const float *data, int64_t count) {
    vf sum[8];
    for (int i = 0; i < 8; i++) sum[i] = v_zero();
    for (int64_t k = 0; k < count; k += 8 * VL) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) sum[i] = v_add(sum[i], v_load(data + k + i * VL));
        _mm_prefetch((const char *)(data + k) + 4096, _MM_HINT_T1);
        _mm_prefetch((const char *)(data + k) + 4096 + 64, _MM_HINT_T1);
    }
    float total = 0.0f;
    for (int i = 0; i < 8; i++) total += v_sum(sum[i]);
    return total;
}
