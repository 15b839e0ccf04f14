/*
 * What `cargo xtask bench debug` runs without an operating system: calls, branches, loads and stores as compiled code
 * has them, ROUNDS times. Its code has the first half of a page for itself, the other half is where breakpoints that
 * are never hit are put; `watched` is the page whose second half watchpoints are put in.
 */
typedef unsigned long word;

struct node {
    struct node *next;
    word key;
};

__attribute__((section(".watched"), aligned(4096))) word watched[8192 / sizeof(word)];
static struct node nodes[1024];
static unsigned table[4096];

#define HOT __attribute__((section(".text.work"), noipa))

HOT static word walk(struct node *at, word steps)
{
    word sum = 0;

    for (; steps; steps--, at = at->next)
        sum += at->key;
    return sum;
}

HOT static unsigned mix(unsigned x)
{
    x ^= x << 13;
    x ^= x >> 17;
    return x ^ x << 5;
}

HOT static word fill(unsigned seed)
{
    unsigned i;
    word odd = 0;

    for (i = 0; i < 256; i++) {
        seed = mix(seed);
        if (seed & 1)
            odd += table[seed >> 20];
        else
            table[seed >> 20] = seed + i;
    }
    return odd;
}

HOT static word sort(unsigned *of, unsigned n)
{
    unsigned i, j;
    word moves = 0;

    for (i = 1; i < n; i++) {
        unsigned x = of[i];

        for (j = i; j && of[j - 1] > x; j--, moves++)
            of[j] = of[j - 1];
        of[j] = x;
    }
    return moves;
}

/* At the begin of the page: where the bench has debuggers stop. */
__attribute__((section(".text.work.first"), noipa)) word work(word rounds)
{
    word sum = 0, i;

    for (i = 0; i < rounds; i++) {
        sum += walk(nodes + (i & 1023), 100);
        sum += fill((unsigned)i | 1);
        sum += sort(table + (i & 2047), 24);
        watched[i & 255] = sum;
    }
    return sum;
}

void turn_off(void);

void begin(void)
{
    unsigned i;

    for (i = 0; i < 1024; i++) {
        nodes[i].next = nodes + (i * 389 + 1) % 1024;
        nodes[i].key = i;
    }
    watched[256] = work(ROUNDS);
    turn_off();
}
