/* top_k and top_p: which tokens of a row are kept. Nothing sorts the vocabulary.
 *
 * Tokens are ordered by (score, largest first; id, lowest first), and what a filter keeps is a beginning of that
 * order: all above a border, and the first of those that equal it. */
#ifndef HW_FILTER_H
#define HW_FILTER_H
#include <stdint.h>

typedef struct {
    float *scores; /* room for a vector behind the last */
    int32_t *ids;  /* ascending */
    long count;
} candidates;

/* Keep what the filters leave of `scores` [count], of which tokens are `ids`, NULL: 0, 1, ... Scores are at most 0 and
 * -infinity for what is gone already; behind them -infinity fills a vector. `left` and `right` have room for `count`. */
void filter_tokens(const float *scores, const int32_t *ids, long count, int32_t top_k, double top_p, candidates *kept,
                   float *left, float *right);
/* Sum of the weights of `count` scores. */
double mass_of(const float *scores, long count);
#endif
