/* What Python and the kernels share: flat structs of pointers and 32-bit sizes, mirrored in library.py.
 *
 * Layouts (bf16 as uint16_t):
 *   packed bf16 weight   [n_pad / 64][k / 2][64][2]         k even, n_pad a multiple of 64, zero padding
 *   packed int8 weight   [n_pad / 64][k / 4][64][4]         signed, k a multiple of 4
 *   KV pool              [block][layer][K, then V]: what a block of tokens needs lies together
 *     K                  [kv head][head_dim / 2][64 tokens][2]
 *     V                  [kv head][32 token pairs][head_dim][2]
 * A row of activations is padded to a multiple of 64 columns with zeros.
 *
 * Rule: the order in which a row's numbers are added is fixed by the shapes of the model and by the
 * row's own position; never by the number of rows, the chunk they came in or the number of threads. */
#ifndef HEADWATER_H
#define HEADWATER_H
#include <stdint.h>

#define BLOCK_TOKENS 64
#define COLUMNS 64 /* of one packed weight block */

typedef struct {
    const void *weight;
    const float *bias;   /* [n_pad] or NULL */
    const float *scale;  /* int8: [n_pad] */
    const int32_t *zero; /* int8: [n_pad], 128 * sum over k of the weights: what the +128 of inputs adds */
    int32_t n_pad, k;
    int32_t byte_rows; /* 0: bf16. int8: rows of bytes that hold one row of inputs, 2 being high and low bytes */
    int32_t blocks;    /* 0, or the kind of its blocks of 32 (blocks.h): weight alone is used */
} hw_linear;

typedef struct {
    hw_linear qkv, output, gate_up, down; /* gate_up: 16 gate columns, 16 up columns, in turn */
    const float *attention_norm, *mlp_norm;           /* [hidden_pad] */
    const float *attention_norm_bias, *mlp_norm_bias; /* [hidden_pad] or NULL: LayerNorm in place of RMSNorm */
    const float *post_attention_norm, *post_mlp_norm; /* [hidden_pad] or NULL: of what is added to the residual */
    const float *q_norm, *k_norm;                     /* [head_dim] or NULL */
    const float *rope_cos, *rope_sin;                 /* [position][rotary_dim / 2] */
    uint16_t *k_cache, *v_cache;                      /* of block 0 */
    int64_t window; /* tokens that a token sees, itself among them; 0: all before it */
} hw_layer;

typedef struct {
    int32_t num_layers, hidden, hidden_pad, num_heads, num_kv_heads, head_dim, act_pad, vocab;
    int32_t byte_rows; /* the largest of all linears */
    int32_t has_blocks;
    int32_t rotary_dim;     /* dimensions of a head that turn: pairs (i, i + rotary_dim / 2); 0: none */
    int32_t activation;     /* 0: silu(gate) * up, 1: gelu(gate) * up, 2: gelu(up), gate_up being up alone */
    int32_t has_post_norms; /* of every layer */
    float norm_eps, attention_scale, embed_scale;
    float attention_cap, logit_cap; /* x becomes cap * tanh(x / cap); 0: none */
    int64_t block_stride; /* elements from a block to the next in k_cache and v_cache */
    const hw_layer *layers;
    hw_linear head;
    hw_linear embedding; /* bf16 or blocks, a column a token */
    const float *position_embedding; /* [position][hidden_pad] or NULL */
    const float *final_norm, *final_norm_bias; /* [hidden_pad]; bias or NULL */
} hw_model;

typedef struct {
    int32_t num_tokens, num_entries, num_logits, reserved;
    const int32_t *token_ids, *positions; /* [num_tokens] */
    const int32_t *entry_starts;          /* [num_entries + 1] into the tokens */
    const int32_t *block_tables;          /* one after the other */
    const int32_t *table_starts;          /* [num_entries] into block_tables */
    const int32_t *logits_tokens;         /* [num_logits] token indices */
    const int32_t *logits_slots;          /* [num_logits] row of `logits` to write, or -1: argmax alone */
    float *logits;                        /* [slots][head.n_pad] */
    int32_t *best_ids;                    /* [num_logits] id of the largest logit, the lowest of equals */
    uint8_t *is_finite;                   /* [num_logits] */
} hw_step;

/* A row to draw from: app.runner.sampling's parameters, its changes to the logits, and the token. Ids that changes
 * name lie within the vocabulary, each but those of banned_ids once. */
typedef struct {
    const float *logits;  /* [vocab], all finite */
    const int32_t *mask;  /* [vocab / 32, up] bit i % 32 of word i / 32: token i may be drawn; or NULL */
    const int64_t *repeated_ids, *output_ids, *bias_ids, *banned_ids;
    const int64_t *allowed_ids; /* ascending; none: all */
    const float *output_counts, *bias_values;
    uint64_t seed, position;
    double top_p;         /* 1: off */
    float repetition_penalty, presence_penalty, frequency_penalty;
    float temperature;    /* 0: the largest */
    float lowest_score;   /* min_p as a score, -infinity: off */
    int32_t top_k;        /* 0: off */
    int32_t num_repeated, num_output, num_bias, num_banned, num_allowed;
    int32_t best_id;      /* of the largest logit, the lowest of equals */
    int32_t token_id;     /* out: -1 where the largest changed logit is not finite */
    int32_t reserved;
} hw_row;

typedef struct hw_context hw_context; /* threads and scratch memory */

#endif
