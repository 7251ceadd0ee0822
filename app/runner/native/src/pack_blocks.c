/* Rows of blocks as GGUF files store them, into the layout of blocks.h; and rows of floats into such blocks.
 *
 * A nibble is copied, never computed: what the file says is what the kernels multiply. */
#include <math.h>
#include <string.h>

#include "blocks.h"

enum { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8 }; /* the numbers of GGUF */

typedef struct {
    uint8_t values[BLOCK_K]; /* w = scale * (value - offset) + minimum */
    float scale, minimum;
    int offset;
} block;

static int source_bytes(int type) { return type == Q4_0 ? 18 : type == Q4_1 ? 20 : 34; }

static float half_at(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return f16_to_float(bits);
}

static void put_half(void *to, float value) {
    const uint16_t bits = float_to_f16(value);
    memcpy(to, &bits, 2);
}

static block read_block(const uint8_t *from, int type) {
    block b = {.scale = half_at(from), .minimum = type == Q4_1 ? half_at(from + 2) : 0.0f};
    b.offset = type == Q4_0 ? 8 : type == Q8_0 ? 128 : 0;
    const uint8_t *bytes = from + (type == Q4_1 ? 4 : 2);
    for (int i = 0; i < BLOCK_K; i++) {
        if (type == Q8_0) b.values[i] = bytes[i] ^ 0x80;
        else b.values[i] = i < 16 ? bytes[i] & 15 : bytes[i - 16] >> 4;
    }
    return b;
}

/* `w`: the block of a unit, `at`: the column within. */
static void write_block(const block *b, int kind, uint8_t *w, int at) {
    const int shift = blocks_has_min(kind) ? 0 : blocks_offset(kind) - b->offset;
    for (int i = 0; i < BLOCK_K; i++) {
        const int value = b->values[i] + shift;
        uint8_t *to = w + (blocks_is_4(kind) ? i % 16 / 4 : i / 4) * UNIT * 4 + at * 4 + i % 4;
        if (!blocks_is_4(kind)) *to = (uint8_t)value;
        else if (i < 16) *to = (uint8_t)((*to & 0xf0) | value);
        else *to = (uint8_t)((*to & 0x0f) | value << 4);
    }
    uint8_t *scales = w + blocks_scales_at(kind) + at * 2;
    put_half(scales, b->scale);
    if (blocks_has_min(kind)) put_half(scales + UNIT * 2, b->minimum - b->scale * (float)b->offset);
}

/* src: [n] rows of ceil(k / 32) blocks of `type`. Row i becomes column columns[i] of dst. A kind of 4 bits takes
 * no Q8_0, one without minima no Q4_1. */
void hw_pack_blocks(void *dst, int32_t kind, const uint8_t *src, int32_t type, int32_t n, int32_t k,
                    const int32_t *columns) {
    const long blocks = (k + BLOCK_K - 1) / BLOCK_K, bytes = blocks_bytes(kind);
    for (long r = 0; r < n; r++) {
        uint8_t *unit = (uint8_t *)dst + columns[r] / UNIT * blocks * bytes;
        for (long i = 0; i < blocks; i++, src += source_bytes(type)) {
            const block b = read_block(src, type);
            write_block(&b, kind, unit + i * bytes, columns[r] % UNIT);
        }
    }
}

static void quantise_q4_1(const float *x, uint8_t *to) {
    float least = x[0], most = x[0];
    for (int i = 1; i < BLOCK_K; i++) least = fminf(least, x[i]), most = fmaxf(most, x[i]);
    const float scale = (most - least) / 15.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    put_half(to, scale);
    put_half(to + 2, least);
    for (int i = 0; i < 16; i++) {
        const int low = (int)rintf((x[i] - least) * inverse), high = (int)rintf((x[i + 16] - least) * inverse);
        to[4 + i] = (uint8_t)((low > 15 ? 15 : low) | (high > 15 ? 15 : high) << 4);
    }
}

static void quantise_q8_0(const float *x, uint8_t *to) {
    float most = 0.0f;
    for (int i = 0; i < BLOCK_K; i++) most = fmaxf(most, fabsf(x[i]));
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    put_half(to, most / 127.0f);
    for (int i = 0; i < BLOCK_K; i++) to[2 + i] = (uint8_t)(int8_t)rintf(x[i] * inverse);
}

/* src: [n][k] floats. dst: [n] rows of ceil(k / 32) blocks, Q4_1 or Q8_0; the last is filled up with zeros. */
void hw_quantise_rows(uint8_t *dst, int32_t type, const float *src, int32_t n, int32_t k) {
    for (long r = 0; r < n; r++, src += k)
        for (int i = 0; i < k; i += BLOCK_K, dst += source_bytes(type)) {
            float x[BLOCK_K] = {0};
            memcpy(x, src + i, sizeof(float) * (size_t)(k - i < BLOCK_K ? k - i : BLOCK_K));
            if (type == Q4_1) quantise_q4_1(x, dst);
            else quantise_q8_0(x, dst);
        }
}
