#include "util.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

bool debug_enabled;

const char *errno_text(int number) {
    static char text[128];
    snprintf(text, sizeof(text), "%s", strerror(number));
    text[0] = (char)tolower((unsigned char)text[0]);
    return text;
}

int fail(struct error *e, const char *kind, const char *format, ...) {
    va_list arguments;
    snprintf(e->kind, sizeof(e->kind), "%s", kind);
    e->hint[0] = 0;
    va_start(arguments, format);
    vsnprintf(e->message, sizeof(e->message), format, arguments);
    va_end(arguments);
    return -1;
}

static const char *kind_of(int number) {
    switch (number) {
    case ENOSPC:
    case EDQUOT:
        return "StorageFull";
    case ENOENT:
        return "NotFound";
    case EINVAL:
    case EXDEV:
    case ENOTDIR:
    case EROFS:
    case ELOOP:
    case ENAMETOOLONG:
        return "InvalidRequest";
    case ENOSYS:
    case EOPNOTSUPP:
    case ENODEV:
        return "Unsupported";
    case EACCES:
    case EPERM:
        return "Forbidden";
    default:
        return "Internal";
    }
}

int fail_errno(struct error *e, int number, const char *format, ...) {
    va_list arguments;
    char what[480];
    va_start(arguments, format);
    vsnprintf(what, sizeof(what), format, arguments);
    va_end(arguments);
    return fail(e, kind_of(number), "%s: %s", what, errno_text(number));
}

bool buffer_append(struct buffer *b, const void *data, size_t length) {
    if (length > SIZE_MAX / 4 - b->length)
        return false;
    if (b->length + length > b->capacity) {
        size_t capacity = b->capacity ? b->capacity : 1024;
        while (capacity < b->length + length)
            capacity *= 2;
        uint8_t *grown = realloc(b->data, capacity);
        if (!grown)
            return false;
        b->data = grown;
        b->capacity = capacity;
    }
    if (length)
        memcpy(b->data + b->length, data, length);
    b->length += length;
    return true;
}

void buffer_drop_front(struct buffer *b, size_t length) {
    if (length >= b->length) {
        b->length = 0;
        return;
    }
    memmove(b->data, b->data + length, b->length - length);
    b->length -= length;
}

void buffer_free(struct buffer *b) {
    free(b->data);
    memset(b, 0, sizeof(*b));
}

void debug(const char *format, ...) {
    if (!debug_enabled)
        return;
    char line[512];
    int used = snprintf(line, sizeof(line), "ambi %8.3f ", (double)now_ns(CLOCK_BOOTTIME) / 1e9);
    va_list arguments;
    va_start(arguments, format);
    used += vsnprintf(line + used, sizeof(line) - (size_t)used - 1, format, arguments);
    va_end(arguments);
    if (used > (int)sizeof(line) - 2)
        used = sizeof(line) - 2;
    line[used++] = '\n';
    int fd = open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC);
    if (fd < 0)
        return;
    write_all(fd, line, (size_t)used);
    close(fd);
}

static int open_regular(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0)
        return -1;
    struct stat st;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode))
        return fd;
    close(fd);
    errno = EINVAL;
    return -1;
}

static ssize_t read_up_to(int fd, char *into, size_t size) {
    size_t have = 0;
    while (have < size) {
        ssize_t n = read(fd, into + have, size - have);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        if (n == 0)
            break;
        have += (size_t)n;
    }
    return (ssize_t)have;
}

ssize_t read_file(const char *path, char *into, size_t size) {
    int fd = open_regular(path);
    if (fd < 0)
        return -1;
    ssize_t n = read_up_to(fd, into, size - 1);
    int saved = errno;
    close(fd);
    errno = saved;
    into[n > 0 ? n : 0] = 0;
    return n;
}

char *read_whole(const char *path, size_t limit) {
    int fd = open_regular(path);
    if (fd < 0)
        return NULL;
    struct stat st;
    char *text = NULL;
    if (fstat(fd, &st) == 0 && (size_t)st.st_size <= limit && (text = malloc((size_t)st.st_size + 1))) {
        ssize_t n = read_up_to(fd, text, (size_t)st.st_size);
        text[n > 0 ? n : 0] = 0;
    } else {
        errno = EFBIG;
    }
    int saved = errno;
    close(fd);
    errno = saved;
    return text;
}

int write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        return -1;
    ssize_t n = write(fd, text, strlen(text));
    int saved = errno;
    close(fd);
    errno = saved;
    return n < 0 ? -1 : 0;
}

int write_all(int fd, const void *data, size_t length) {
    const uint8_t *at = data;
    while (length) {
        ssize_t n = write(fd, at, length);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        at += n;
        length -= (size_t)n;
    }
    return 0;
}

uint64_t now_ns(int clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
