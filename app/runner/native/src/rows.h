/* What is done to one row of activations at a time. */
#ifndef HW_ROWS_H
#define HW_ROWS_H
#include "headwater.h"

/* out[0 .. hidden_pad) = the embedding of a token at a position. */
void row_embed(const hw_model *model, int token, int position, float *out);
/* out = x / rms(x) * weight, or with a bias (x - mean) / deviation * weight + bias; rounded to bf16. */
void row_norm(const hw_model *model, const float *x, const float *weight, const float *bias, uint16_t *out);
/* out += x / rms(x) * weight */
void row_add_norm(const hw_model *model, const float *x, const float *weight, float *out);
/* bytes = round(x / scale) + 128 with scale = max|x| / 127. k a multiple of 16. */
void row_quantise(const uint16_t *x, int k, uint8_t *bytes, float *scale);
/* The same in 16 bits, scale = max|x| / 32767: high[i] * 256 + low[i] = round(x / scale) + 32768. */
void row_quantise_wide(const uint16_t *x, int k, uint8_t *high, uint8_t *low, float *scale);
/* Norm (where the model has one) and rotate the heads of q and k in place: float32 row of qkv. */
void row_rotate(const hw_model *model, const hw_layer *layer, int position, float *qkv);
#endif
