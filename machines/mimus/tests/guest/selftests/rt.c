/* The programs' runtime, and the list of tests. */
#include "rt.h"

#include <stdarg.h>

#ifdef __x86_64__
__asm__(".globl _start\n"
        "_start: mov %rsp, %rdi\n"
        "and $-16, %rsp\n"
        "call start\n"
        ".globl restorer\n"
        "restorer: mov $15, %eax\n" /* rt_sigreturn */
        "syscall\n"
        ".globl sys\n"
        "sys: mov %rdi, %rax\n"
        "mov %rsi, %rdi\n"
        "mov %rdx, %rsi\n"
        "mov %rcx, %rdx\n"
        "mov %r8, %r10\n"
        "mov %r9, %r8\n"
        "mov 8(%rsp), %r9\n"
        "syscall\n"
        "ret\n");
#else
__asm__(".globl _start\n"
        "_start: mov %esp, %eax\n"
        "and $-16, %esp\n"
        "sub $12, %esp\n"
        "push %eax\n"
        "call start\n"
        ".globl restorer\n"
        "restorer: mov $173, %eax\n" /* rt_sigreturn */
        "int $0x80\n"
        ".globl sys\n"
        "sys: push %ebp\n push %edi\n push %esi\n push %ebx\n"
        "mov 20(%esp), %eax\n"
        "mov 24(%esp), %ebx\n"
        "mov 28(%esp), %ecx\n"
        "mov 32(%esp), %edx\n"
        "mov 36(%esp), %esi\n"
        "mov 40(%esp), %edi\n"
        "mov 44(%esp), %ebp\n"
        "int $0x80\n"
        "pop %ebx\n pop %esi\n pop %edi\n pop %ebp\n"
        "ret\n");
#endif

void restorer(void);

struct action {
    handler *handler;
    ulong flags;
    void (*restorer)(void);
    uint64_t mask;
};

void catch(int signal, handler *h, ulong flags)
{
    struct action action = { h, flags | (h ? 0x04000004 : 0), restorer, 0 }; /* SA_SIGINFO | SA_RESTORER */
    sys(SYS_rt_sigaction, (long)signal, &action, 0L, 8L);
}

void alternate_stack(void)
{
    static struct {
        void *at;
        int flags;
        size_t size;
    } stack;
    if (!stack.at)
        stack.at = pages(65536, PROT_READ | PROT_WRITE);
    stack.size = 65536;
    sys(SYS_sigaltstack, &stack, 0L);
}

_Noreturn void leave(int status)
{
    for (;;)
        sys(SYS_exit_group, (long)status);
}

void *memset(void *to, int value, size_t n)
{
    char *p = to;
    while (n--) {
        *p++ = value;
        __asm__ volatile("" ::: "memory"); /* else gcc makes a call of memset of it */
    }
    return to;
}

void *memcpy(void *to, const void *from, size_t n)
{
    char *p = to;
    const char *q = from;
    while (n--) {
        *p++ = *q++;
        __asm__ volatile("" ::: "memory");
    }
    return to;
}

int memcmp(const void *a, const void *b, size_t n)
{
    const unsigned char *p = a, *q = b;
    for (; n--; p++, q++)
        if (*p != *q)
            return *p - *q;
    return 0;
}

int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

void *pages(size_t bytes, int protection)
{
    static ulong next = 0x10000000;
    ulong at = next;
    next += (bytes + 0x1fff) & ~0xffful;
    long got = sys(SYS_mmap, at, bytes, (long)protection, (long)(MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED), -1L, 0L);
    if ((ulong)got != at) {
        print("FAIL mmap %ld\n", got);
        leave(1);
    }
    return (void *)at;
}

static char line[512];
static size_t length;

static void put(char c)
{
    if (length < sizeof line)
        line[length++] = c;
}

static void number(uint64_t value, unsigned base, int width)
{
    char digits[24];
    int n = 0;
    do {
        unsigned digit = 0;
        /* Divided by hand: i386 has no library here for 64-bit division. */
        uint64_t quotient = 0;
        for (int bit = 63; bit >= 0; bit--) {
            digit = digit << 1 | (value >> bit & 1);
            if (digit >= base)
                digit -= base, quotient |= 1ull << bit;
        }
        digits[n++] = "0123456789abcdef"[digit];
        value = quotient;
    } while (value || n < width);
    while (n)
        put(digits[--n]);
}

/* %s %c %d %u %x, with l or ll, and a width that zeros fill. */
static void format_to_line(const char *f, va_list args)
{
    for (; *f; f++) {
        if (*f != '%') {
            put(*f);
            continue;
        }
        int width = 0, longs = 0;
        for (f++; *f >= '0' && *f <= '9'; f++)
            width = width * 10 + *f - '0';
        for (; *f == 'l'; f++)
            longs++;
        if (*f == 's') {
            for (const char *s = va_arg(args, const char *); *s; s++)
                put(*s);
        } else if (*f == 'c') {
            put(va_arg(args, int));
        } else if (*f == 'd') {
            int64_t v = longs > 1 ? va_arg(args, int64_t) : longs ? va_arg(args, long) : va_arg(args, int);
            if (v < 0)
                put('-');
            number(v < 0 ? -(uint64_t)v : (uint64_t)v, 10, width);
        } else if (*f == 'u' || *f == 'x') {
            uint64_t v = longs > 1 ? va_arg(args, uint64_t) : longs ? va_arg(args, ulong) : va_arg(args, unsigned);
            number(v, *f == 'x' ? 16 : 10, width);
        } else {
            put(*f);
        }
    }
}

static void flush(void)
{
    sys(SYS_write, 1L, line, length);
    length = 0;
}

void print(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    format_to_line(format, args);
    va_end(args);
    flush();
}

ulong *auxiliary;
static const char *running;
static int failures;

int check(int ok, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print("%s %s: ", ok ? "ok" : "FAIL", running);
    format_to_line(format, args);
    va_end(args);
    put('\n');
    flush();
    failures += !ok;
    return ok;
}

void skip(const char *why)
{
    print("skip %s: %s\n", running, why);
}

void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    __asm__ volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(subleaf));
}

int have_avx(void)
{
    uint32_t r[4], low, high;
    cpuid(1, 0, r);
    if ((r[2] & (1u << 27 | 1u << 28)) != (1u << 27 | 1u << 28))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6;
}

wide fold(wide hash, const void *data, size_t n)
{
    const unsigned char *p = data;
    while (n--)
        hash = (hash ^ *p++) * 0x100000001b3ull;
    return hash;
}

int in_child(void (*body)(void))
{
    int status = -1;
    long pid = sys(SYS_fork);
    if (pid == 0) {
        body();
        leave(0);
    }
    sys(SYS_wait4, pid, &status, 0L, 0L);
    return status;
}

long write_ldt(const struct segment *s)
{
    return sys(SYS_modify_ldt, 0x11L, s, sizeof *s);
}

int kernel_is_64(void)
{
    unsigned cs;
    __asm__("mov %%cs, %0" : "=r"(cs));
    return (cs & 0xffff) == 0x23 || (cs & 0xffff) == 0x33;
}

static const struct {
    const char *name;
    test *run;
} TESTS[] = {
    { "loops", loops },
    { "sigreturns", sigreturns },
    { "steps", steps },
    { "ports", ports },
    { "ldts", ldts },
    { "calls", calls },
    { "bases", bases },
    { "no_exec", no_exec },
    { "traps", traps },
    { "blocks", blocks },
    { "icebp", icebp },
    { "stack_loads", stack_loads },
    { "initial_state", initial_state },
};

/* Runs the tests that are named, or all; each in a process of its own. */
void start(ulong *stack)
{
    int count = stack[0];
    char **names = (char **)&stack[1];
    ulong *end = &stack[count + 2];
    while (*end)
        end++;
    auxiliary = end + 1;
    for (size_t i = 0; i < sizeof TESTS / sizeof TESTS[0]; i++) {
        int wanted = count < 2;
        for (int n = 1; n < count; n++)
            wanted |= same(names[n], TESTS[i].name);
        if (!wanted)
            continue;
        running = TESTS[i].name;
        int status = -1;
        long pid = sys(SYS_fork);
        if (pid == 0) {
            TESTS[i].run();
            leave(failures != 0);
        }
        sys(SYS_wait4, pid, &status, 0L, 0L);
        /* Failures inside have their own lines; this one says that it came to its end. */
        if ((status & 0x7f) && status != -1)
            print("FAIL %s: ended by signal %d\n", running, status & 0x7f);
        print("end %s\n", running);
    }
    print("<<done>>\n");
    leave(0);
}
