/* Several threads and processes at once, for machines of four processors. They run if they are named only. */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"

enum { THREADS = 4 };

static void failed(const char *what)
{
    perror(what);
    exit(1);
}

static void on_all(void *(*run)(void *))
{
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], 0, run, (void *)i))
            failed("pthread_create");
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], 0);
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    __asm__ volatile(".4byte 0x0100000f" ::: "memory"); /* pause */
#endif
}

/* A test-and-set lock around a few words that all threads change. */
static struct {
    int lock;
    char pad[60];
    uint64_t words[8];
} locked;

static void *take_lock(void *argument)
{
    uint64_t seed = (uint64_t)(size_t)argument + 1, own = 0;
    for (int i = 0; i < 600000; i++) {
        while (__atomic_exchange_n(&locked.lock, 1, __ATOMIC_ACQUIRE))
            while (__atomic_load_n(&locked.lock, __ATOMIC_RELAXED))
                relax();
        for (int k = 0; k < 8; k++)
            locked.words[k] += (uint64_t)k + 1;
        __atomic_store_n(&locked.lock, 0, __ATOMIC_RELEASE);
        for (int k = 0; k < 40; k++)
            own += next_random(&seed);
    }
    __atomic_fetch_add(&locked.words[0], own, __ATOMIC_RELAXED);
    return 0;
}

static uint64_t spin_locks(void)
{
    memset(&locked, 0, sizeof locked);
    on_all(take_lock);
    return fold(locked.words, sizeof locked.words);
}

/* Pairs of threads that wake each other. */
static struct {
    int turn;
    char pad[60];
} pairs[THREADS / 2];

static void futex(int *word, int operation, int value)
{
    if (syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, 0, 0, 0) < 0 && errno != EAGAIN && errno != EINTR)
        failed("futex");
}

static void *pass_on(void *argument)
{
    size_t number = (size_t)argument;
    int *turn = &pairs[number / 2].turn, own = (int)(number & 1);
    for (int i = 0; i < 12000; i++) {
        while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != own)
            futex(turn, FUTEX_WAIT, !own);
        __atomic_store_n(turn, !own, __ATOMIC_RELEASE);
        futex(turn, FUTEX_WAKE, 1);
    }
    return 0;
}

static uint64_t futex_ping_pong(void)
{
    memset(pairs, 0, sizeof pairs);
    on_all(pass_on);
    return (uint64_t)(pairs[0].turn + pairs[1].turn);
}

/* Counters in one line that all threads add to, and one that is exchanged if it has not changed. */
static struct {
    uint64_t added[4], exchanged;
} shared;

static void *count(void *argument)
{
    (void)argument;
    for (uint64_t i = 0; i < 6000000; i++) {
        __atomic_fetch_add(&shared.added[i & 3], i, __ATOMIC_RELAXED);
        if ((i & 7) == 0) {
            uint64_t seen = __atomic_load_n(&shared.exchanged, __ATOMIC_RELAXED);
            while (!__atomic_compare_exchange_n(&shared.exchanged, &seen, seen + i, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
                relax();
        }
    }
    return 0;
}

static uint64_t shared_counters(void)
{
    memset(&shared, 0, sizeof shared);
    on_all(count);
    return fold(&shared, sizeof shared);
}

/*
 * What a compiler does to a source: reads text, puts its names into a table, allocates for each, sorts, and writes a file.
 * Many of them, four at a time, as processes of their own.
 */
enum { JOBS = 48, LINES = 12000, BUCKETS = 2048 };

struct name {
    struct name *next;
    unsigned count;
    char text[24];
};

static int by_text(const void *a, const void *b)
{
    return strcmp((*(struct name *const *)a)->text, (*(struct name *const *)b)->text);
}

static void path_of(char *path, size_t size, int job, const char *kind)
{
    snprintf(path, size, "/tmp/bench-%d.%s", job, kind);
}

int parallel_job(int job)
{
    static struct name *buckets[BUCKETS];
    char path[64], line[64];
    unsigned names = 0;
    path_of(path, sizeof path, job, "c");
    FILE *in = fopen(path, "r");
    if (!in)
        failed(path);
    while (fgets(line, sizeof line, in)) {
        line[strcspn(line, " \n")] = 0;
        struct name **at = &buckets[fold(line, strlen(line)) % BUCKETS];
        while (*at && strcmp((*at)->text, line))
            at = &(*at)->next;
        if (!*at) {
            *at = need(sizeof **at);
            snprintf((*at)->text, sizeof (*at)->text, "%s", line);
            names++;
        }
        (*at)->count++;
    }
    fclose(in);
    struct name **sorted = need(names * sizeof *sorted), **next = sorted;
    for (int i = 0; i < BUCKETS; i++)
        for (struct name *n = buckets[i]; n; n = n->next)
            *next++ = n;
    qsort(sorted, names, sizeof *sorted, by_text);
    path_of(path, sizeof path, job, "o");
    FILE *out = fopen(path, "w");
    if (!out)
        failed(path);
    for (unsigned i = 0; i < names; i++)
        fprintf(out, "%s %u\n", sorted[i]->text, sorted[i]->count);
    return fclose(out) != 0;
}

static void write_source(int job)
{
    char path[64];
    uint64_t seed = (uint64_t)job + 1;
    path_of(path, sizeof path, job, "c");
    FILE *out = fopen(path, "w");
    if (!out)
        failed(path);
    for (int i = 0; i < LINES; i++)
        fprintf(out, "name_%llx some text\n", (unsigned long long)(next_random(&seed) % 3001));
    fclose(out);
}

static uint64_t sum_of(int job)
{
    char path[64], line[64];
    uint64_t sum = 0;
    path_of(path, sizeof path, job, "o");
    FILE *in = fopen(path, "r");
    if (!in)
        failed(path);
    while (fgets(line, sizeof line, in))
        sum = sum * 31 + fold(line, strlen(line));
    fclose(in);
    unlink(path);
    path_of(path, sizeof path, job, "c");
    unlink(path);
    return sum;
}

static void wait_for_one(void)
{
    int status;
    if (wait(&status) < 0 || status)
        failed("a job");
}

static uint64_t parallel_make(void)
{
    uint64_t sum = 0;
    for (int job = 0; job < JOBS; job++)
        write_source(job);
    for (int job = 0; job < JOBS; job++) {
        if (job >= THREADS)
            wait_for_one();
        char number[16];
        snprintf(number, sizeof number, "%d", job);
        pid_t child = fork();
        if (child < 0)
            failed("fork");
        if (child == 0) {
            execl(self_path, self_path, "--job", number, (char *)0);
            _exit(127);
        }
    }
    for (int i = 0; i < THREADS; i++)
        wait_for_one();
    for (int job = 0; job < JOBS; job++)
        sum = sum * 31 + sum_of(job);
    return sum;
}

const struct row parallel_rows[] = {
    { "spin-locks", spin_locks, 0 },
    { "futex-ping-pong", futex_ping_pong, 0 },
    { "shared-counters", shared_counters, 0 },
    { "parallel-make", parallel_make, 0 },
    { 0, 0, 0 },
};
