/* A thread pool for two cores that other people use too.
 *
 * Each thread has a share of a phase's items and takes them a few at a time, then those that the others
 * have not begun. A phase is over when its items are done, not when its threads have arrived: a thread
 * that was kept from its core holds up nobody, unless it is in the middle of an item, and joins in
 * wherever the others are when it comes back.
 *
 * Waiting is a short spin and then a futex. When a region lost much of its time to a thread that was taken
 * off its core within an item, the next ones run on the calling thread alone, and after them the pool
 * probes again (results do not depend on the thread count). */
#define _GNU_SOURCE
#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SPINS 1000            /* of about 10 to 25 ns each */
#define STALL_FLOOR_NS 300000 /* a region that waited less is not called contended */
#define SOLO_FIRST 8
#define SOLO_MOST 128
#define LINE 64
#define MOST_GRAINS 32768 /* pieces of a phase that a share can count */
#define STOP 0xffffffffu  /* a round's count: end of the threads */
#define MXCSR_FLUSH 0x9fc0 /* default rounding, denormals are zero */

/* What a thread may still take of the phase that the tag names: pieces next .. end - 1. Of another phase: it has
 * taken nothing yet. */
typedef struct {
    _Alignas(LINE) _Atomic uint64_t word; /* tag << 32 | next << 16 | end */
} share;

struct hw_pool {
    /* tag << 32 | pieces of the running phase; no pieces: between regions. Tags count phases, for ever. */
    _Alignas(LINE) _Atomic uint64_t round;
    _Alignas(LINE) _Atomic uint32_t done; /* pieces of the running phase */
    _Alignas(LINE) _Atomic uint32_t sleepers;
    _Atomic uint64_t stalled_ns; /* asleep within the running region, all threads */
    /* Of the running phase: written before its round, read by who holds a piece of it. */
    _Alignas(LINE) const hw_region *region;
    int phase, items, grain; /* items a piece */
    int num_threads;
    int solo_left, solo_next;
    pthread_t *threads;
    share *shares;
#ifdef HW_PROFILE
    int profiled;
    uint64_t *profile;
#endif
};

struct worker {
    hw_pool *pool;
    int thread;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#ifdef HW_PROFILE
static uint64_t cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

void pool_profile(hw_pool *pool, int num_phases, uint64_t *ns) {
    pool->profiled = num_phases;
    pool->profile = ns;
}

#define PROFILE_BEGIN uint64_t profile_begin = cpu_ns()
#define PROFILE_END(pool, region, phase, thread)                                    \
    if ((thread) == 0 && (pool)->profile && (region)->num_phases == (pool)->profiled) \
    (pool)->profile[phase] += cpu_ns() - profile_begin
#else
#define PROFILE_BEGIN
#define PROFILE_END(pool, region, phase, thread)
#endif

static uint32_t tag_of(uint64_t word) { return (uint32_t)(word >> 32); }
static uint32_t pieces_of(uint64_t round) { return (uint32_t)round; }

/* ---- waiting ---- */

/* The half of `round` that holds the tag. */
static uint32_t *tag_word(hw_pool *pool) { return (uint32_t *)(void *)&pool->round + 1; }

static uint64_t sleep_until_changed(hw_pool *pool, uint64_t old) {
    uint64_t seen, begin = now_ns();
    atomic_fetch_add(&pool->sleepers, 1);
    while ((seen = atomic_load(&pool->round)) == old)
        syscall(SYS_futex, tag_word(pool), FUTEX_WAIT_PRIVATE, tag_of(old), NULL, NULL, 0);
    atomic_fetch_sub(&pool->sleepers, 1);
    if (pieces_of(old) > 0) atomic_fetch_add(&pool->stalled_ns, now_ns() - begin);
    return seen;
}

/* Return the round once it differs from `old`. */
static uint64_t wait_changed(hw_pool *pool, uint64_t old) {
    for (int i = 0; i < SPINS; i++) {
        uint64_t seen = atomic_load_explicit(&pool->round, memory_order_acquire);
        if (seen != old) return seen;
        _mm_pause();
    }
    return sleep_until_changed(pool, old);
}

static void publish(hw_pool *pool, uint32_t pieces) {
    atomic_store(&pool->done, 0);
    atomic_store(&pool->round, (uint64_t)(tag_of(atomic_load(&pool->round)) + 1) << 32 | pieces);
    if (atomic_load(&pool->sleepers)) syscall(SYS_futex, tag_word(pool), FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}

/* Begin the first phase from `phase` on that has items, or end the region. */
static void begin_phase(hw_pool *pool, int phase) {
    const hw_region *region = pool->region;
    int items = 0;
    while (phase < region->num_phases && (items = region->count(region->job, phase)) == 0) phase++;
    if (items == 0) {
        publish(pool, 0);
        return;
    }
    pool->phase = phase;
    pool->items = items;
    pool->grain = (items + MOST_GRAINS - 1) / MOST_GRAINS;
    publish(pool, (uint32_t)((items + pool->grain - 1) / pool->grain));
}

/* ---- working ---- */

/* Where a thread's share begins: at even pieces, because two columns units together are quicker. */
static uint32_t share_start(uint32_t pieces, int thread, int num_threads) {
    if (thread == num_threads) return pieces;
    return (uint32_t)((uint64_t)pieces * (uint32_t)thread / (uint32_t)num_threads) & ~1u;
}

static uint32_t portion(uint32_t left) {
    uint32_t part = (left + 3) / 4;
    return left <= 2 ? 1 : (part + 1) & ~1u;
}

/* Take some pieces of `owner`'s share in this round; returns how many. A round that is over gives none: a share that
 * was taken from shows it by its tag, and who takes first looks at the round again. */
static uint32_t take(hw_pool *pool, uint64_t round, int owner, uint32_t *from) {
    _Atomic uint64_t *word = &pool->shares[owner].word;
    const uint32_t tag = tag_of(round);
    uint64_t seen = atomic_load(word);
    for (;;) {
        uint32_t next = (uint32_t)(seen >> 16 & 0xffff), end = (uint32_t)(seen & 0xffff);
        if ((int32_t)(tag_of(seen) - tag) > 0) return 0;
        if (tag_of(seen) != tag) {
            next = share_start(pieces_of(round), owner, pool->num_threads);
            end = share_start(pieces_of(round), owner + 1, pool->num_threads);
        }
        if (next >= end) return 0;
        uint32_t count = portion(end - next);
        uint64_t rest = (uint64_t)tag << 32 | (uint64_t)(next + count) << 16 | end;
        if (!atomic_compare_exchange_weak(word, &seen, rest)) continue;
        *from = next;
        return atomic_load(&pool->round) == round ? count : 0;
    }
}

static uint32_t run_share(hw_pool *pool, uint64_t round, int owner, int thread) {
    uint32_t total = 0, from, count;
    while ((count = take(pool, round, owner, &from)) > 0) {
        const int grain = pool->grain, last = (int)(from + count) * grain;
        PROFILE_BEGIN;
        pool->region->run(pool->region->job, pool->phase, (int)from * grain, last < pool->items ? last : pool->items,
                          thread);
        PROFILE_END(pool, pool->region, pool->phase, thread);
        total += count;
    }
    return total;
}

/* Work in one round until none of its pieces is left, and begin the next where this thread did the last. */
static void work(hw_pool *pool, uint64_t round, int thread) {
    uint32_t total = 0;
    for (int i = 0; i < pool->num_threads; i++) total += run_share(pool, round, (thread + i) % pool->num_threads, thread);
    if (total == 0) return;
    /* Pieces that are not counted as done yet keep the round alive. */
    const int next = pool->phase + 1;
    if (atomic_fetch_add(&pool->done, total) + total == pieces_of(round)) begin_phase(pool, next);
}

static void *worker_main(void *arg) {
    struct worker self = *(struct worker *)arg;
    free(arg);
    _mm_setcsr(MXCSR_FLUSH);
    for (uint64_t seen = 0;;) {
        seen = wait_changed(self.pool, seen);
        if (pieces_of(seen) == STOP) return NULL;
        if (pieces_of(seen) > 0) work(self.pool, seen, self.thread);
    }
}

/* ---- regions ---- */

static void judge(hw_pool *pool, uint64_t wall_ns) {
    uint64_t stalled = atomic_load(&pool->stalled_ns);
    if (stalled > STALL_FLOOR_NS && stalled > wall_ns / 4) {
        pool->solo_left = pool->solo_next;
        pool->solo_next = pool->solo_next * 2 > SOLO_MOST ? SOLO_MOST : pool->solo_next * 2;
    } else {
        pool->solo_next = SOLO_FIRST;
    }
}

static void run_alone(hw_pool *pool, const hw_region *region) {
    (void)pool;
    for (int phase = 0; phase < region->num_phases; phase++) {
        int items = region->count(region->job, phase);
        PROFILE_BEGIN;
        if (items > 0) region->run(region->job, phase, 0, items, 0);
        PROFILE_END(pool, region, phase, 0);
    }
}

static void run_together(hw_pool *pool, const hw_region *region) {
    uint64_t begin = now_ns();
    pool->region = region;
    atomic_store(&pool->stalled_ns, 0);
    begin_phase(pool, 0);
    for (uint64_t round = atomic_load(&pool->round); pieces_of(round) > 0;) {
        work(pool, round, 0);
        round = wait_changed(pool, round);
    }
    judge(pool, now_ns() - begin);
}

int pool_run(hw_pool *pool, const hw_region *region) {
    const int is_alone = pool->num_threads == 1 || pool->solo_left > 0;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(MXCSR_FLUSH);
    if (pool->solo_left > 0) pool->solo_left--;
    if (is_alone) run_alone(pool, region);
    else run_together(pool, region);
    _mm_setcsr(before);
    return is_alone ? 1 : pool->num_threads;
}

int pool_threads(const hw_pool *pool) { return pool->num_threads; }

/* ---- life ---- */

static int start_worker(hw_pool *pool, int thread) {
    struct worker *self = malloc(sizeof *self);
    if (!self) return -1;
    *self = (struct worker){pool, thread};
    if (pthread_create(&pool->threads[thread], NULL, worker_main, self) == 0) return 0;
    free(self);
    return -1;
}

static void start_workers(hw_pool *pool, int num_threads) {
    /* Signals belong to Python's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; i < num_threads && start_worker(pool, i) == 0; i++) pool->num_threads = i + 1;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

hw_pool *pool_open(int num_threads) {
    if (num_threads < 1) num_threads = 1;
    if (num_threads > 64) num_threads = 64;
    hw_pool *pool = aligned_alloc(LINE, (sizeof *pool + LINE - 1) / LINE * LINE);
    if (!pool) return NULL;
    *pool = (hw_pool){.num_threads = 1, .solo_next = SOLO_FIRST};
    pool->threads = calloc((size_t)num_threads, sizeof *pool->threads);
    pool->shares = aligned_alloc(LINE, sizeof(share) * (size_t)num_threads);
    if (!pool->threads || !pool->shares) { /* serve with one */
        pool_close(pool);
        return NULL;
    }
    for (int i = 0; i < num_threads; i++) atomic_init(&pool->shares[i].word, 0);
    start_workers(pool, num_threads);
    return pool;
}

void pool_close(hw_pool *pool) {
    publish(pool, STOP);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool->shares);
    free(pool);
}
