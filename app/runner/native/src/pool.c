/* A thread pool for two cores that other people use too.
 *
 * Waiting is a short spin and then a futex, so a descheduled partner costs its own time slice and no
 * spinning. When a step lost much of its time to such a partner, the next steps run on the calling
 * thread alone, and after them the pool probes again (results do not depend on the thread count). */
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
#define STALL_FLOOR_NS 300000 /* a step that waited less is not called contended */
#define SOLO_FIRST 8
#define SOLO_MOST 128
#define LINE 64

struct hw_pool {
    /* (sequence << 8) | threads of the region; 0 threads = end. One word, so that a thread that sits a
     * region out never reads the fields of the next one. */
    _Alignas(LINE) _Atomic uint32_t start;
    _Alignas(LINE) _Atomic uint32_t arrived;
    _Alignas(LINE) _Atomic uint32_t phase;
    _Alignas(LINE) _Atomic uint32_t sleepers;
    _Atomic uint64_t stalled_ns; /* asleep in barriers of the running region, all threads */
    _Alignas(LINE) region_fn fn;
    void *arg;
    int num_threads;
    int solo_left, solo_next;
    pthread_t *threads;
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

/* Return the word once it differs from `old`. */
static uint32_t wait_change(hw_pool *pool, _Atomic uint32_t *word, uint32_t old) {
    uint32_t seen;
    for (int i = 0; i < SPINS; i++) {
        if ((seen = atomic_load_explicit(word, memory_order_acquire)) != old) return seen;
        _mm_pause();
    }
    atomic_fetch_add(&pool->sleepers, 1);
    while ((seen = atomic_load(word)) == old) syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    atomic_fetch_sub(&pool->sleepers, 1);
    return seen;
}

static void wake(hw_pool *pool, _Atomic uint32_t *word) {
    if (atomic_load(&pool->sleepers)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}

void pool_barrier(hw_pool *pool, int num_threads) {
    if (num_threads == 1) return;
    uint32_t phase = atomic_load(&pool->phase);
    if (atomic_fetch_add(&pool->arrived, 1) + 1 == (uint32_t)num_threads) {
        atomic_store(&pool->arrived, 0);
        atomic_fetch_add(&pool->phase, 1);
        wake(pool, &pool->phase);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool->phase, memory_order_acquire) != phase) return;
        _mm_pause();
    }
    uint64_t begin = now_ns();
    wait_change(pool, &pool->phase, phase);
    atomic_fetch_add(&pool->stalled_ns, now_ns() - begin);
}

static void *worker_main(void *arg) {
    struct worker self = *(struct worker *)arg;
    free(arg);
    for (uint32_t seen = 0;;) {
        seen = wait_change(self.pool, &self.pool->start, seen);
        int active = (int)(seen & 255);
        if (active == 0) return NULL;
        if (self.thread < active) self.pool->fn(self.pool->arg, self.thread, active);
    }
}

static void publish(hw_pool *pool, int active) {
    uint32_t sequence = (atomic_load(&pool->start) >> 8) + 1;
    atomic_store(&pool->start, sequence << 8 | (uint32_t)active);
    wake(pool, &pool->start);
}

static void judge(hw_pool *pool, uint64_t wall_ns) {
    uint64_t stalled = atomic_load(&pool->stalled_ns);
    if (stalled > STALL_FLOOR_NS && stalled > wall_ns / 4) {
        pool->solo_left = pool->solo_next;
        pool->solo_next = pool->solo_next * 2 > SOLO_MOST ? SOLO_MOST : pool->solo_next * 2;
    } else {
        pool->solo_next = SOLO_FIRST;
    }
}

int pool_run(hw_pool *pool, region_fn fn, void *arg) {
    if (pool->num_threads == 1 || pool->solo_left > 0) {
        if (pool->solo_left > 0) pool->solo_left--;
        fn(arg, 0, 1);
        return 1;
    }
    uint64_t begin = now_ns();
    pool->fn = fn;
    pool->arg = arg;
    atomic_store(&pool->stalled_ns, 0);
    publish(pool, pool->num_threads);
    fn(arg, 0, pool->num_threads);
    judge(pool, now_ns() - begin);
    return pool->num_threads;
}

int pool_threads(const hw_pool *pool) { return pool->num_threads; }

static int start_worker(hw_pool *pool, int thread) {
    struct worker *self = malloc(sizeof *self);
    if (!self) return -1;
    *self = (struct worker){pool, thread};
    if (pthread_create(&pool->threads[thread], NULL, worker_main, self) == 0) return 0;
    free(self);
    return -1;
}

hw_pool *pool_open(int num_threads) {
    if (num_threads < 1) num_threads = 1;
    if (num_threads > 64) num_threads = 64;
    hw_pool *pool = aligned_alloc(LINE, (sizeof *pool + LINE - 1) / LINE * LINE);
    if (!pool) return NULL;
    *pool = (hw_pool){.num_threads = num_threads, .solo_next = SOLO_FIRST};
    pool->threads = calloc((size_t)num_threads, sizeof *pool->threads);
    /* Signals belong to Python's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 1; pool->threads && i < num_threads; i++)
        if (start_worker(pool, i)) {
            pool->num_threads = i; /* serve with those we got */
            break;
        }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return pool;
}

void pool_close(hw_pool *pool) {
    publish(pool, 0);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->threads[i], NULL);
    free(pool->threads);
    free(pool);
}
