/* Weights from row-major files into the layouts of headwater.h. */
#include <math.h>
#include <string.h>

#include "vmath.h"
#include "headwater.h"

/* Column of source row n: runs of `run` rows lie `stride` columns apart (gate and up take turns). */
static long column_of(long n, int column, int run, int stride) { return column + n / run * stride + n % run; }

/* src: bf16 [n][k], k even. Fills columns of dst, [.. / 64][k / 2][64][2]. */
void hw_pack_bf16(uint16_t *dst, const uint16_t *src, int32_t n, int32_t k, int32_t column, int32_t run,
                  int32_t stride) {
    const long pairs = k / 2;
    for (long n0 = 0; n0 < n; n0 += 16)
        for (long p0 = 0; p0 < pairs; p0 += 16) {
            const long rows = n - n0 < 16 ? n - n0 : 16, end = p0 + 16 < pairs ? p0 + 16 : pairs;
            for (long r = 0; r < rows; r++) {
                const long c = column_of(n0 + r, column, run, stride);
                uint32_t *to = (uint32_t *)dst + c / COLUMNS * pairs * COLUMNS + c % COLUMNS;
                const uint16_t *from = src + (n0 + r) * k;
                for (long p = p0; p < end; p++) memcpy(to + p * COLUMNS, from + 2 * p, 4);
            }
        }
}

static float row_largest(const uint16_t *row, long k) {
    float most = 0.0f;
    for (long i = 0; i < k; i++) {
        union { uint32_t bits; float value; } w = {.bits = (uint32_t)row[i] << 16};
        most = fmaxf(most, fabsf(w.value));
    }
    return most;
}

/* src: bf16 [n][k], k a multiple of 4. Each row gets the scale that takes its largest weight to 127. */
void hw_pack_int8(int8_t *dst, float *scale, int32_t *zero, const uint16_t *src, int32_t n, int32_t k, int32_t column,
                  int32_t run, int32_t stride) {
    for (long r = 0; r < n; r++) {
        const long c = column_of(r, column, run, stride);
        const uint16_t *row = src + r * k;
        int8_t *to = dst + c / COLUMNS * k * COLUMNS + c % COLUMNS * 4;
        const float most = row_largest(row, k), inverse = most > 0.0f ? 127.0f / most : 0.0f;
        int32_t sum = 0;
        for (long i = 0; i < k; i++) {
            union { uint32_t bits; float value; } w = {.bits = (uint32_t)row[i] << 16};
            int q = (int)rintf(w.value * inverse);
            to[i / 4 * COLUMNS * 4 + i % 4] = (int8_t)q;
            sum += q;
        }
        scale[c] = most / 127.0f;
        zero[c] = 128 * sum;
    }
}

/* float32 to bf16, to nearest even; a NaN stays one. */
void hw_round_bf16(uint16_t *dst, const float *src, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, src + i, 4);
        int is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        dst[i] = is_nan ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

/* Index of the first of n bf16 values that is NaN or infinite, or -1. */
int64_t hw_first_not_finite(const uint16_t *src, int64_t n) {
    const int64_t span = 4096;
    for (int64_t from = 0; from < n; from += span) {
        const int64_t to = from + span < n ? from + span : n;
        uint16_t largest = 0;
        for (int64_t i = from; i < to; i++) {
            uint16_t exponent = src[i] & 0x7f80;
            largest = exponent > largest ? exponent : largest;
        }
        if (largest < 0x7f80) continue;
        for (int64_t i = from; i < to; i++)
            if ((src[i] & 0x7f80) == 0x7f80) return i;
    }
    return -1;
}
