/* Paged attention over blocks of 64 tokens; it also writes the KV of new tokens. */
#ifndef HW_ATTENTION_H
#define HW_ATTENTION_H
#include "headwater.h"

#define QUERY_ROWS 64 /* most (token, head) rows of one item */

typedef struct {
    int32_t entry, first, count; /* tokens of the step: first .. first + count */
} query_block;

/* Scratch of one thread. */
typedef struct {
    uint16_t q[QUERY_ROWS * 256], p[QUERY_ROWS * BLOCK_TOKENS];
    float scores[QUERY_ROWS * BLOCK_TOKENS], out[QUERY_ROWS * 256], largest[QUERY_ROWS], sum[QUERY_ROWS];
} attention_scratch;

/* How many tokens share one pass over the keys. */
int query_tokens(const hw_model *model);
/* Store K and V of one token, whose row of the step is `qkv`. `has_previous`, `has_next`: the row before it, or the
 * next one (`stride` floats on), is its neighbour in the same sequence: values are stored for two tokens at once. */
void cache_write(const hw_model *model, const hw_layer *layer, const float *qkv, long stride, int position,
                 const int32_t *table, int has_previous, int has_next);
/* out[token][head][dim] for the tokens of a query block and the heads that share kv head `kv_head`.
 * next_block, next_kv_head: what this thread is likely to read after it. */
void attend(const hw_model *model, const hw_layer *layer, const hw_step *step, const query_block *block, int kv_head,
            int32_t next_block, int next_kv_head, const float *qkv, long qkv_stride, uint16_t *out, long out_stride,
            attention_scratch *scratch);
#endif
