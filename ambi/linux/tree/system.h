/* System calls and small helpers without a C library: this code is a program of its own on the host and part of the agent in
 * a guest. Everything returns what the kernel does, -errno on failure. */
#ifndef TREE_SYSTEM_H
#define TREE_SYSTEM_H

#include <asm/errno.h>
#include <asm/fcntl.h>
#include <linux/mman.h>
#include <asm/unistd.h>
#include <linux/fcntl.h>
#include <linux/openat2.h>
#include <linux/stat.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *memcpy(void *to, const void *from, size_t length);
void *memset(void *to, int value, size_t length);
int memcmp(const void *a, const void *b, size_t length);
size_t strlen(const char *text);
int strcmp(const char *a, const char *b);

static inline long sys(long number, long a, long b, long c, long d, long e, long f) {
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

#define SYS1(name, a) sys(__NR_##name, (long)(a), 0, 0, 0, 0, 0)
#define SYS2(name, a, b) sys(__NR_##name, (long)(a), (long)(b), 0, 0, 0, 0)
#define SYS3(name, a, b, c) sys(__NR_##name, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define SYS4(name, a, b, c, d) sys(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define SYS5(name, a, b, c, d, e) sys(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define SYS6(name, a, b, c, d, e, f) sys(__NR_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

enum { HERE = AT_FDCWD, SEEK_FROM_START = 0, SEEK_TO_DATA = 3, SEEK_TO_HOLE = 4 };

static inline bool starts_with(const char *text, const char *prefix) {
    while (*prefix)
        if (*text++ != *prefix++)
            return false;
    return true;
}

/* Memory that is taken in order and given back in the opposite one; its pages are the kernel's until they are used. */
char *arena_take(size_t length);
char *arena_mark(void);
void arena_release(char *mark);

/* Open `path` below the root of this process: never through a magic link of procfs. -errno. */
int open_path(int directory, const char *path, uint64_t flags, uint64_t resolve);
/* Whether `fd` lies on a file system that shows the kernel and holds no files: never read, never written. */
bool is_kernel_file_system(int fd);
/* What is known of `name` in `directory`, itself when it is a link; of `directory` when `name` is empty. */
int stat_of(int directory, const char *name, struct statx *into);

static inline bool is_kind(const struct statx *st, unsigned kind) {
    return (st->stx_mode & S_IFMT) == kind;
}

#endif
