/* The answer, as fields of the guest protocol: u16 tag | u16 zero | u32 length | bytes, little-endian. */
#include "parts.h"

static char answer[16384];
static size_t answer_length;

static void add(unsigned tag, const void *data, size_t length) {
    uint16_t head[4] = {(uint16_t)tag, 0, (uint16_t)length, (uint16_t)(length >> 16)};
    if (answer_length + sizeof(head) + length > sizeof(answer))
        return;
    memcpy(answer + answer_length, head, sizeof(head));
    memcpy(answer + answer_length + sizeof(head), data, length);
    answer_length += sizeof(head) + length;
}

void answer_number(unsigned tag, uint64_t value) {
    add(tag, &value, sizeof(value));
}

void answer_text(unsigned tag, const char *text) {
    size_t length = strlen(text);
    add(tag, text, length < 8192 ? length : 8192);
}

static void leave(int status) __attribute__((noreturn));
static void leave(int status) {
    for (size_t done = 0; done < answer_length;) {
        long n = SYS3(write, TREE_ANSWER, answer + done, answer_length - done);
        if (n < 0 && n != -EINTR)
            break;
        done += n > 0 ? (size_t)n : 0;
    }
    for (;;)
        SYS1(exit_group, status);
}

void answer_done(void) {
    leave(0);
}

static const struct {
    int number;
    const char *kind, *text;
} ERRORS[] = {
    {EPERM, "Forbidden", "operation not permitted"},
    {ENOENT, "NotFound", "no such file or directory"},
    {EIO, "Internal", "input/output error"},
    {ENOMEM, "Unavailable", "cannot allocate memory"},
    {EACCES, "Forbidden", "permission denied"},
    {EBUSY, "Conflict", "device or resource busy"},
    {EEXIST, "Conflict", "file exists"},
    {EXDEV, "InvalidRequest", "invalid cross-device link"},
    {ENOTDIR, "InvalidRequest", "not a directory"},
    {EISDIR, "InvalidRequest", "is a directory"},
    {EINVAL, "InvalidRequest", "invalid argument"},
    {EMFILE, "Unsupported", "too many directories below each other"},
    {ETXTBSY, "Conflict", "text file busy"},
    {EFBIG, "StorageFull", "file too large"},
    {ENOSPC, "StorageFull", "no space left on device"},
    {EROFS, "InvalidRequest", "read-only file system"},
    {EMLINK, "InvalidRequest", "too many links"},
    {EPIPE, "Unavailable", "nobody reads the archive any more"},
    {ENAMETOOLONG, "InvalidRequest", "file name too long"},
    {ENOTEMPTY, "Conflict", "directory not empty"},
    {ELOOP, "InvalidRequest", "too many levels of symbolic links"},
    {EOPNOTSUPP, "Unsupported", "operation not supported"},
    {EDQUOT, "StorageFull", "disk quota exceeded"},
    {ESTALE, "Unavailable", "stale file handle"},
};

static size_t append(char *text, size_t at, size_t size, const char *more) {
    while (*more && at + 1 < size)
        text[at++] = *more++;
    text[at] = 0;
    return at;
}

static void number_text(char *into, unsigned number) {
    char digits[12];
    size_t count = 0;
    do
        digits[count++] = (char)('0' + number % 10);
    while (number /= 10);
    while (count)
        *into++ = digits[--count];
    *into = 0;
}

static const char *text_of(int number, const char **kind) {
    static char other[32] = "error ";
    for (size_t i = 0; i < sizeof(ERRORS) / sizeof(*ERRORS); i++)
        if (ERRORS[i].number == number) {
            *kind = ERRORS[i].kind;
            return ERRORS[i].text;
        }
    *kind = "Internal";
    number_text(other + 6, (unsigned)number);
    return other;
}

void give_up(const char *kind, const char *what, const char *subject, long result) {
    static char message[6144];
    const char *ignored;
    size_t at = append(message, 0, sizeof(message) - 256, what);
    if (subject && *subject) {
        at = append(message, at, sizeof(message) - 256, " ");
        at = append(message, at, sizeof(message) - 256, subject);
    }
    if (result) {
        at = append(message, at, sizeof(message), ": ");
        append(message, at, sizeof(message), text_of((int)-result, &ignored));
    }
    answer_length = 0;
    answer_text(TREE_ERROR_KIND, kind);
    answer_text(TREE_ERROR_MESSAGE, message);
    leave(1);
}

void give_up_on(const char *what, const char *subject, long result) {
    const char *kind;
    text_of((int)-result, &kind);
    give_up(kind, what, subject, result);
}
