/*
 * The benchmark's programs in one file. Prints for each row
 *
 *     BEGIN name
 *     END name seconds cpu-seconds value
 *
 * With -w it waits for a line on its standard input after each of them, so that who measures
 * from outside reads a clock at exactly that point. Options: -w; -l lists the rows;
 * -r NAME COMMAND... times another program as a row; otherwise names of rows, or none for all but those
 * of several threads.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

const char *self_path;

static const struct row *const lists[] = {
    integer_rows, structure_rows, float_rows, memory_rows,
#ifdef WITH_X86
    x87_rows, simd_rows,
#endif
    kernel_rows,
    /* The last: if named only. */
    parallel_rows,
};
enum { LISTS = sizeof lists / sizeof *lists };

void *need(size_t bytes)
{
    void *p = malloc(bytes);
    if (!p) {
        fprintf(stderr, "programs: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    memset(p, 0, bytes);
    return p;
}

static double wall(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double seconds(struct timeval t)
{
    return t.tv_sec + t.tv_usec * 1e-6;
}

/* Time that this process and its finished children ran. */
static double cpu(void)
{
    struct rusage self, children;
    getrusage(RUSAGE_SELF, &self);
    getrusage(RUSAGE_CHILDREN, &children);
    return seconds(self.ru_utime) + seconds(self.ru_stime) + seconds(children.ru_utime) + seconds(children.ru_stime);
}

static void pause_for_reader(int waits)
{
    char line[64];
    fflush(stdout);
    if (waits && !fgets(line, sizeof line, stdin))
        exit(1);
}

static void measure(const char *name, uint64_t (*run)(void), int waits)
{
    printf("BEGIN %s\n", name);
    pause_for_reader(waits);
    double from = wall(), used = cpu();
    uint64_t value = run();
    double to = wall(), after = cpu();
    printf("END %s %.6f %.6f %016llx\n", name, to - from, after - used, (unsigned long long)value);
    pause_for_reader(waits);
}

static char **command;

static uint64_t run_command(void)
{
    int status;
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stdout))
            _exit(126);
        execv(command[0], command);
        _exit(127);
    }
    waitpid(child, &status, 0);
    return (uint64_t)status;
}

static int wanted(const char *name, char **names)
{
    if (!*names)
        return 1;
    for (; *names; names++)
        if (!strcmp(*names, name))
            return 1;
    return 0;
}

int main(int argc, char **argv)
{
    int waits = 0, lists_only = 0;
    self_path = argv[0];
    char **rest = argv + (argc > 0);
    if (*rest && !strcmp(*rest, "--exit"))
        return 0;
    if (*rest && !strcmp(*rest, "--job") && rest[1])
        return parallel_job(atoi(rest[1]));
    for (; *rest && **rest == '-'; rest++) {
        if (!strcmp(*rest, "-w"))
            waits = 1;
        else if (!strcmp(*rest, "-l"))
            lists_only = 1;
        else if (!strcmp(*rest, "-r") && rest[1] && rest[2]) {
            command = rest + 2;
            measure(rest[1], run_command, waits);
            return 0;
        } else {
            fprintf(stderr, "programs: there is no option %s\n", *rest);
            return 2;
        }
    }
    for (size_t i = 0; i < LISTS - (*rest || lists_only ? 0 : 1); i++)
        for (const struct row *row = lists[i]; row->name; row++) {
            if (!wanted(row->name, rest))
                continue;
            if (lists_only)
                puts(row->name);
            else if (!row->able || row->able())
                measure(row->name, row->run, waits);
        }
    return 0;
}
