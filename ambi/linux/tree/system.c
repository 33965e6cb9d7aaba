#include "parts.h"

enum { ARENA_BYTES = 1 << 30 };

static char *arena, *arena_at;

char *arena_take(size_t length) {
    if (!arena) {
        long got = SYS6(mmap, 0, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (got < 0 && got > -4096)
            give_up_on("cannot get memory", NULL, got);
        arena = arena_at = (char *)got;
    }
    length = (length + 7) & ~(size_t)7;
    if (length > (size_t)(arena + ARENA_BYTES - arena_at))
        give_up("Unsupported", "the tree has more entries than can be looked at in one request", NULL, 0);
    char *taken = arena_at;
    arena_at += length;
    return taken;
}

char *arena_mark(void) {
    return arena_take(0);
}

void arena_release(char *mark) {
    arena_at = mark;
}

int open_path(int directory, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = resolve | RESOLVE_NO_MAGICLINKS};
    long fd;
    do
        fd = SYS4(openat2, directory, path, &how, sizeof(how));
    while (fd == -EAGAIN || fd == -EINTR);
    return (int)fd;
}

bool is_kernel_file_system(int fd) {
    static const unsigned MAGICS[] = {
        0x9fa0,     0x62656572, 0x27e0eb,   0x63677270, 0x1cd1,     0x19800202, 0x64626720, 0x74726163,
        0x73636673, 0xcafe4a11, 0x6e736673, 0x62656570, 0x50494446, 0x65735543, 0x6165676c, 0xf97cff8c,
    }; /* linux/magic.h: proc sysfs cgroup cgroup2 devpts mqueue debugfs tracefs securityfs bpf nsfs configfs pidfs fusectl
          pstore selinux */
    long buffer[32] = {0};
    if (SYS2(fstatfs, fd, buffer) < 0)
        return true;
    for (size_t i = 0; i < sizeof(MAGICS) / sizeof(*MAGICS); i++)
        if ((unsigned)buffer[0] == MAGICS[i])
            return true;
    return false;
}

int stat_of(int directory, const char *name, struct statx *into) {
    unsigned flags = AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT | (*name ? 0 : AT_EMPTY_PATH);
    return (int)SYS5(statx, directory, name, flags, STATX_BASIC_STATS, into);
}
