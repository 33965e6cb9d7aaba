/* The program by itself, for a container: ambi-tree VERB PATH FLAGS UID GID [EXCLUDED...]. Not part of the agent. */
#include "parts.h"

#include <linux/prctl.h>

void *memcpy(void *to, const void *from, size_t length) {
    void *result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
    return result;
}

void *memset(void *to, int value, size_t length) {
    void *result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(value) : "memory");
    return result;
}

int memcmp(const void *a, const void *b, size_t length) {
    const unsigned char *left = a, *right = b;
    for (; length; length--, left++, right++)
        if (*left != *right)
            return *left - *right;
    return 0;
}

size_t strlen(const char *text) {
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}

int strcmp(const char *a, const char *b) {
    while (*a && *a == *b) {
        a++;
        b++;
    }
    return (unsigned char)*a - (unsigned char)*b;
}

static uint32_t number(const char *text) {
    uint32_t value = 0;
    while (*text >= '0' && *text <= '9')
        value = value * 10 + (uint32_t)(*text++ - '0');
    return value;
}

__attribute__((noreturn, used)) static void run(long argc, const char *const *argv) {
    if (argc < 6)
        give_up("Internal", "ambi-tree was started with too few arguments", NULL, 0);
    SYS2(prctl, PR_SET_NAME, "ambi-tree");
    struct tree_request request = {argv[1], argv[2], number(argv[3]), number(argv[4]), number(argv[5]), argv + 6};
    tree_main(&request);
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov (%rsp), %rdi\n\tlea 8(%rsp), %rsi\n\tand $-16, %rsp\n\tcall run\n");
