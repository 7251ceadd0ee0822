/* Embedding, RMSNorm, RoPE and activation rounding: one row is one thread's, left to right. */
#include "rows.h"

#include <math.h>

#include "blocks.h"

static void bf16_column(const hw_linear *lin, int column, float *out) {
    const long pairs = lin->k / 2;
    const uint32_t *packed = (const uint32_t *)lin->weight + (column / COLUMNS) * pairs * COLUMNS + column % COLUMNS;
    for (long i = 0; i < pairs; i++) {
        union { uint32_t bits; float value; } even, odd;
        even.bits = packed[i * COLUMNS] << 16;
        odd.bits = packed[i * COLUMNS] & 0xffff0000u;
        out[2 * i] = even.value;
        out[2 * i + 1] = odd.value;
    }
}

void row_embed(const hw_model *model, int token, float *out) {
    if (model->embedding.blocks) blocks_column(&model->embedding, token, out);
    else bf16_column(&model->embedding, token, out);
    for (int i = model->hidden; i < model->hidden_pad; i++) out[i] = 0.0f;
}

/* 1 / sqrt(mean of squares + eps); padding is zero and adds nothing. */
static float inverse_rms(const float *x, int padded, int count, float eps) {
    vf sum = v_zero();
    for (int i = 0; i < padded; i += VL) {
        vf v = v_load(x + i);
        sum = v_fma(v, v, sum);
    }
    return 1.0f / sqrtf(v_sum(sum) / (float)count + eps);
}

void row_norm(const hw_model *model, const float *x, const float *weight, uint16_t *out) {
    vf scale = v_set1(inverse_rms(x, model->hidden_pad, model->hidden, model->norm_eps));
    for (int i = 0; i < model->hidden_pad; i += VL)
        v_store_bf16(out + i, v_mul(v_mul(v_load(x + i), scale), v_load(weight + i)));
}

static float row_largest(const uint16_t *x, int k) {
    vf largest = v_zero();
    for (int i = 0; i < k; i += VL) largest = v_max(largest, v_abs(v_load_bf16(x + i)));
    return v_largest(largest);
}

void row_quantise(const uint16_t *x, int k, uint8_t *bytes, float *scale) {
    float most = row_largest(x, k);
    *scale = most / 127.0f;
    vf inverse = v_set1(most > 0.0f ? 127.0f / most : 0.0f);
    for (int i = 0; i < k; i += VL) v_store_u8(bytes + i, v_mul(v_load_bf16(x + i), inverse));
}

void row_quantise_wide(const uint16_t *x, int k, uint8_t *high, uint8_t *low, float *scale) {
    float most = row_largest(x, k);
    *scale = most / 32767.0f;
    vf inverse = v_set1(most > 0.0f ? 32767.0f / most : 0.0f);
    for (int i = 0; i < k; i += VL) v_store_u16_halves(high + i, low + i, v_mul(v_load_bf16(x + i), inverse));
}

static void head_norm(const hw_model *model, const float *weight, float *head) {
    const int dim = model->head_dim;
    vf scale = v_set1(inverse_rms(head, dim, dim, model->norm_eps));
    for (int i = 0; i < dim; i += VL) v_store(head + i, v_mul(v_mul(v_load(head + i), scale), v_load(weight + i)));
}

/* Rotate pairs (i, i + dim / 2). */
static void head_rotate(float *head, int half, const float *cosines, const float *sines) {
    for (int i = 0; i < half; i += VL) {
        vf a = v_load(head + i), b = v_load(head + half + i), c = v_load(cosines + i), s = v_load(sines + i);
        v_store(head + i, v_sub(v_mul(a, c), v_mul(b, s)));
        v_store(head + half + i, v_fma(b, c, v_mul(a, s)));
    }
}

void row_rotate(const hw_model *model, const hw_layer *layer, int position, float *qkv) {
    const int half = model->head_dim / 2, heads = model->num_heads + model->num_kv_heads;
    const float *cosines = model->rope_cos + (long)position * half, *sines = model->rope_sin + (long)position * half;
    for (int h = 0; h < heads; h++) {
        float *head = qkv + h * model->head_dim;
        const float *weight = h < model->num_heads ? layer->q_norm : layer->k_norm;
        if (weight) head_norm(model, weight, head);
        head_rotate(head, half, cosines, sines);
    }
}
