/* Who reads which keys together. It decides how often memory is read and in which order, never what a row computes. */
#include <stdlib.h>

#include "attention.h"

#define PROMPT_ROWS 48 /* of a pass over a prompt's own keys */
#define SHARED_ROWS 12 /* of a head, in a pass over keys that sequences share: two of the largest tiles */

/* How many tokens make `rows` rows, heads of 64 dimensions; of larger heads half as many. */
static int tokens_in(const hw_model *m, int rows) {
    const int tokens = (m->head_dim > 64 ? rows / 2 : rows) / (m->num_heads / m->num_kv_heads);
    return tokens > 0 ? tokens : 1;
}

static const int32_t *table_of(const hw_step *s, query q) { return s->block_tables + s->table_starts[q.entry]; }

static int is_single(const hw_step *s, int entry) { return s->entry_starts[entry + 1] - s->entry_starts[entry] == 1; }

/* The blocks before the token's own one: they are full, and it sees all of them. */
static int full_blocks(const hw_step *s, query q) { return s->positions[q.token] / BLOCK_TOKENS; }

/* How many blocks, `most` at most, two sequences have in common at their beginning. */
static int common_blocks(const hw_step *s, query a, query b, int most) {
    int same = 0;
    if (full_blocks(s, b) < most) most = full_blocks(s, b);
    while (same < most && table_of(s, a)[same] == table_of(s, b)[same]) same++;
    return same;
}

static void add_items(attention_plan *plan, const hw_model *m, attention_item item, int heads) {
    for (item.kv_head = 0; item.kv_head < m->num_kv_heads; item.kv_head += heads) {
        const int left = m->num_kv_heads - item.kv_head;
        item.heads = left < heads ? left : heads;
        plan->items[plan->num_items++] = item;
    }
}

/* Entries of several tokens: some tokens at a time, each kv head by itself. Returns how many tokens they have. */
static int add_prompts(attention_plan *plan, const hw_model *m, const hw_step *s) {
    const int most = tokens_in(m, PROMPT_ROWS);
    int count = 0;
    for (int e = 0; e < s->num_entries; e++)
        for (int t = s->entry_starts[e], end = is_single(s, e) ? t : s->entry_starts[e + 1]; t < end; t += most) {
            const int tokens = end - t < most ? end - t : most;
            add_items(plan, m, (attention_item){.first = count, .count = tokens}, 1);
            for (int i = 0; i < tokens; i++) plan->queries[count++] = (query){.token = t + i, .entry = e};
        }
    return count;
}

static int by_first_block(const void *a, const void *b) {
    const query *x = a, *y = b;
    if (x->first_block != y->first_block) return x->first_block < y->first_block ? -1 : 1;
    return x->entry - y->entry;
}

/* The single tokens behind `count` others, those that share their first block side by side. Returns how many. */
static int gather_singles(attention_plan *plan, const hw_step *s, int count) {
    query *singles = plan->queries + count;
    int found = 0;
    for (int e = 0; e < s->num_entries; e++) {
        if (!is_single(s, e)) continue;
        singles[found] = (query){.token = s->entry_starts[e], .entry = e};
        singles[found].first_block = table_of(s, singles[found])[0];
        found++;
    }
    qsort(singles, (size_t)found, sizeof *singles, by_first_block);
    return found;
}

/* How many of the queries from `first` on, before `end`, go through the blocks together that they share. One that shares
 * less than half of what the others do is left to the next item. */
static attention_item shared_item(const attention_plan *plan, const hw_step *s, int first, int end, int most) {
    const query *q = plan->queries;
    attention_item item = {.first = first, .count = 1, .common = full_blocks(s, q[first])};
    for (int i = first + 1; i < end && item.count < most; i++, item.count++) {
        const int common = common_blocks(s, q[first], q[i], item.common);
        if (common == 0 || (item.count > 1 && 2 * common < item.common)) break;
        item.common = common;
    }
    if (item.count == 1) item.common = 0;
    return item;
}

/* Sequences that go on by one token. They take the kv heads of a block together, as those lie in memory, unless threads
 * would be left without work. */
static void add_singles(attention_plan *plan, const hw_model *m, const hw_step *s, int count, int threads) {
    const int singles = gather_singles(plan, s, count), most = tokens_in(m, SHARED_ROWS);
    const int group = m->num_heads / m->num_kv_heads, is_enough = threads == 1 || singles >= 2 * threads;
    for (int i = count; i < count + singles;) {
        const attention_item item = shared_item(plan, s, i, count + singles, is_enough ? most : 1);
        const int fit = QUERY_ROWS / (item.count * group);
        add_items(plan, m, item, fit > 1 && is_enough ? fit : 1);
        i += item.count;
    }
}

/* The blocks that the items read, each once. */
static void plan_held(attention_plan *plan, const hw_step *s) {
    plan->num_held = 0;
    for (int i = 0; i < plan->num_items; i++) {
        const attention_item *item = plan->items + i;
        if (item->kv_head > 0) continue;
        for (int t = 0; t < item->count; t++) {
            const query q = plan->queries[item->first + t];
            if (!item->common && q.token + 1 != s->entry_starts[q.entry + 1]) continue; /* not a sequence's last token */
            for (int b = t > 0 ? item->common : 0; b <= full_blocks(s, q) && plan->num_held < MOST_HELD; b++)
                plan->held[plan->num_held++] = table_of(s, q)[b];
        }
    }
}

void plan_attention(attention_plan *plan, const hw_model *model, const hw_step *step, int threads) {
    plan->num_items = 0;
    add_singles(plan, model, step, add_prompts(plan, model, step), threads);
    plan_held(plan, step);
}
