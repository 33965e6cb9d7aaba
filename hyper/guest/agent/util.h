/* Errors, buffers and small file helpers that every part of the agent uses. */
#ifndef AGENT_UTIL_H
#define AGENT_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What an ERROR message carries: the kind is a class name of ambi.core.errors. */
struct error {
    char kind[32];
    char message[640];
    char hint[256];
};

/* Fill `e` and return -1. fail_errno appends ": " and the text of `number`. */
int fail(struct error *e, const char *kind, const char *format, ...) __attribute__((format(printf, 3, 4)));
int fail_errno(struct error *e, int number, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* strerror in the form of Go's syscall.Errno, which docker's clients look for: no capital at the start. */
const char *errno_text(int number);

/* A growing byte array. `append` returns false, and changes nothing, without memory. */
struct buffer {
    uint8_t *data;
    size_t length;
    size_t capacity;
};
bool buffer_append(struct buffer *b, const void *data, size_t length);
void buffer_drop_front(struct buffer *b, size_t length);
void buffer_free(struct buffer *b);

/* One line on the console, only with `ambi.debug` on the kernel command line. */
extern bool debug_enabled;
void debug(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* At most `size` - 1 bytes of a small file as a string; -1 and errno. A file of an image may be anything: only regular
 * files (or those of procfs and sysfs) are read, and opening one never blocks. */
ssize_t read_file(const char *path, char *into, size_t size);
/* A whole regular file of at most `limit` bytes, NUL-terminated; NULL and errno. */
char *read_whole(const char *path, size_t limit);
int write_file(const char *path, const char *text);
int write_all(int fd, const void *data, size_t length);

uint64_t now_ns(int clock);

#endif
