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

void row_embed(const hw_model *model, int token, int position, float *out) {
    if (model->embedding.blocks) blocks_column(&model->embedding, token, out);
    else bf16_column(&model->embedding, token, out);
    for (int i = model->hidden; i < model->hidden_pad; i++) out[i] = 0.0f;
    if (model->embed_scale != 1.0f)
        for (int i = 0; i < model->hidden_pad; i += VL) v_store(out + i, v_mul(v_load(out + i), v_set1(model->embed_scale)));
    if (!model->position_embedding) return;
    const float *at = model->position_embedding + (long)position * model->hidden_pad;
    for (int i = 0; i < model->hidden_pad; i += VL) v_store(out + i, v_add(v_load(out + i), v_load(at + i)));
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

static void layer_norm(const hw_model *model, const float *x, const float *weight, const float *bias, uint16_t *out) {
    vf sum = v_zero(), squares = v_zero();
    for (int i = 0; i < model->hidden_pad; i += VL) sum = v_add(sum, v_load(x + i));
    vf mean = v_set1(v_sum(sum) / (float)model->hidden);
    for (int i = 0; i < model->hidden_pad; i += VL) {
        vf from_mean = v_select(v_first(model->hidden - i), v_sub(v_load(x + i), mean), v_zero());
        squares = v_fma(from_mean, from_mean, squares);
    }
    vf scale = v_set1(1.0f / sqrtf(v_sum(squares) / (float)model->hidden + model->norm_eps));
    for (int i = 0; i < model->hidden_pad; i += VL) /* weight and bias are zero in the padding */
        v_store_bf16(out + i, v_fma(v_mul(v_sub(v_load(x + i), mean), scale), v_load(weight + i), v_load(bias + i)));
}

void row_norm(const hw_model *model, const float *x, const float *weight, const float *bias, uint16_t *out) {
    if (bias) {
        layer_norm(model, x, weight, bias, out);
        return;
    }
    vf scale = v_set1(inverse_rms(x, model->hidden_pad, model->hidden, model->norm_eps));
    for (int i = 0; i < model->hidden_pad; i += VL)
        v_store_bf16(out + i, v_mul(v_mul(v_load(x + i), scale), v_load(weight + i)));
}

void row_add_norm(const hw_model *model, const float *x, const float *weight, float *out) {
    vf scale = v_set1(inverse_rms(x, model->hidden_pad, model->hidden, model->norm_eps));
    for (int i = 0; i < model->hidden_pad; i += VL)
        v_store(out + i, v_add(v_load(out + i), v_mul(v_mul(v_load(x + i), scale), v_load(weight + i))));
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

/* Rotate pairs (i, i + half). */
static void head_rotate(float *head, int half, const float *cosines, const float *sines) {
    int i = 0;
    for (; i + VL <= half; i += VL) {
        vf a = v_load(head + i), b = v_load(head + half + i), c = v_load(cosines + i), s = v_load(sines + i);
        v_store(head + i, v_sub(v_mul(a, c), v_mul(b, s)));
        v_store(head + half + i, v_fma(b, c, v_mul(a, s)));
    }
    for (; i < half; i++) {
        const float a = head[i], b = head[half + i], c = cosines[i], s = sines[i];
        head[i] = a * c - b * s;
        head[half + i] = fmaf(b, c, a * s);
    }
}

void row_rotate(const hw_model *model, const hw_layer *layer, int position, float *qkv) {
    const int half = model->rotary_dim / 2, heads = model->num_heads + model->num_kv_heads;
    const float *cosines = layer->rope_cos + (long)position * half, *sines = layer->rope_sin + (long)position * half;
    for (int h = 0; h < heads; h++) {
        float *head = qkv + h * model->head_dim;
        const float *weight = h < model->num_heads ? layer->q_norm : layer->k_norm;
        if (weight) head_norm(model, weight, head);
        head_rotate(head, half, cosines, sines);
    }
}
