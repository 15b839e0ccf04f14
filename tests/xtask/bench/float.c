/* Double precision. Compiled twice for x86: for SSE2 and, as x87_rows, for the x87. */
#include <math.h>
#include <stdlib.h>

#include "bench.h"

#ifdef X87
#define ROWS x87_rows
#define NAME(name) name "-x87"
#else
#define ROWS float_rows
#define NAME(name) name
#endif

static uint64_t bits(double d)
{
    union { double d; uint64_t u; } both = { d };
    return both.u;
}

static uint64_t matrix(void)
{
    enum { N = 96 };
    double *a = need(N * N * sizeof *a), *b = need(N * N * sizeof *b), *c = need(N * N * sizeof *c);
    for (int i = 0; i < N * N; i++)
        a[i] = i % 17 * 0.25 - 1, b[i] = i % 13 * 0.5 - 2;
    for (int round = 0; round < 40; round++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++) {
                double sum = 0;
                for (int k = 0; k < N; k++)
                    sum += a[i * N + k] * b[k * N + j];
                c[i * N + j] = c[i * N + j] * 0.5 + sum;
            }
    uint64_t value = fold(c, N * N * sizeof *c);
    free(a), free(b), free(c);
    return value;
}

/* Five bodies, each pulling the others; a made-up system. */
static uint64_t nbody(void)
{
    double p[5][3], v[5][3], m[5];
    for (int i = 0; i < 5; i++) {
        m[i] = 1.0 / (1 + 3 * i);
        for (int k = 0; k < 3; k++) {
            p[i][k] = (i * 7 + k * 3) % 11 - 5.0;
            v[i][k] = ((i * 5 + k) % 7 - 3) * 0.1;
        }
    }
    for (int step = 0; step < 150000; step++) {
        for (int i = 0; i < 5; i++)
            for (int j = i + 1; j < 5; j++) {
                double d[3], r2 = 0.01;
                for (int k = 0; k < 3; k++)
                    d[k] = p[i][k] - p[j][k], r2 += d[k] * d[k];
                double pull = 0.001 / (r2 * sqrt(r2));
                for (int k = 0; k < 3; k++)
                    v[i][k] -= d[k] * m[j] * pull, v[j][k] += d[k] * m[i] * pull;
            }
        for (int i = 0; i < 5; i++)
            for (int k = 0; k < 3; k++)
                p[i][k] += 0.001 * v[i][k];
    }
    return bits(p[0][0]) ^ bits(p[4][2]);
}

/* A dense system by elimination with pivots, and the counts of an escape-time set. */
static uint64_t solve(void)
{
    enum { N = 64 };
    static double a[N][N + 1];
    uint64_t seed = 9, value = 0;
    for (int round = 0; round < 160; round++) {
        for (int i = 0; i < N; i++)
            for (int j = 0; j <= N; j++)
                a[i][j] = (double)(int)(next_random(&seed) >> 40 & 1023) - 512;
        for (int c = 0; c < N; c++) {
            int best = c;
            for (int r = c + 1; r < N; r++)
                if (fabs(a[r][c]) > fabs(a[best][c]))
                    best = r;
            for (int k = c; k <= N; k++) {
                double t = a[c][k];
                a[c][k] = a[best][k], a[best][k] = t;
            }
            for (int r = c + 1; r < N; r++) {
                double f = a[r][c] / a[c][c];
                for (int k = c; k <= N; k++)
                    a[r][k] -= f * a[c][k];
            }
        }
        value ^= bits(a[N - 1][N] / a[N - 1][N - 1]);
    }
    for (int y = 0; y < 64; y++)
        for (int x = 0; x < 64; x++) {
            double cr = x / 32.0 - 1.5, ci = y / 32.0 - 1, r = 0, i = 0;
            int n = 0;
            for (; n < 500 && r * r + i * i < 4; n++) {
                double t = r * r - i * i + cr;
                i = 2 * r * i + ci, r = t;
            }
            value += (uint64_t)n << (x & 15);
        }
    return value;
}

const struct row ROWS[] = {
    { NAME("matrix"), matrix, 0 },
    { NAME("nbody"), nbody, 0 },
    { NAME("solve"), solve, 0 },
    { 0, 0, 0 },
};
