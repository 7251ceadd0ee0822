/* Paged attention over blocks of 64 tokens; it also writes the KV of new tokens. */
#ifndef HW_ATTENTION_H
#define HW_ATTENTION_H
#include "headwater.h"

#define QUERY_ROWS 64  /* most (head, token) rows of one item */
#define MOST_HELD 1024 /* blocks that are drawn in before their layer: beyond that caches hold no more */

/* A token of the step. */
typedef struct {
    int32_t token, entry, first_block;
} query;

/* What one pass over keys and values computes: some kv heads, for tokens of one sequence or, where `common` is not 0,
 * for the one token of each of several sequences whose first `common` blocks are the same and full. */
typedef struct {
    int32_t first, count; /* of the plan's queries */
    int32_t kv_head, heads;
    int32_t common;
} attention_item;

typedef struct {
    query *queries; /* [num_tokens]; an item's lie together */
    attention_item *items;
    int32_t *held; /* blocks that the step reads, num_held of them */
    int num_items, num_held;
} attention_plan;

/* Scratch of one thread. */
typedef struct {
    uint16_t q[QUERY_ROWS * 256], p[QUERY_ROWS * BLOCK_TOKENS];
    float scores[QUERY_ROWS * BLOCK_TOKENS], out[QUERY_ROWS * 256], largest[QUERY_ROWS], sum[QUERY_ROWS];
} attention_scratch;

/* Share a step's attention out, for `threads` threads. */
void plan_attention(attention_plan *plan, const hw_model *model, const hw_step *step, int threads);
/* Store K and V of one token, whose row of the step is `qkv`. `has_previous`, `has_next`: the row before it, or the
 * next one (`stride` floats on), is its neighbour in the same sequence: values are stored for two tokens at once. */
void cache_write(const hw_model *model, const hw_layer *layer, const float *qkv, long stride, int position,
                 const int32_t *table, int has_previous, int has_next);
/* out[token][head][dim] for the plan's item `index`. */
void attend(const hw_model *model, const hw_layer *layer, const hw_step *step, const attention_plan *plan, int index,
            const float *qkv, long qkv_stride, uint16_t *out, long out_stride, attention_scratch *scratch);
#endif
