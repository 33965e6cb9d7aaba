#include "cgroup.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define TOP "/sys/fs/cgroup"
#define GROUP TOP "/workload"

int cgroup_make(struct error *e) {
    /* Together, because each change waits for every CPU; what else the kernel has is of no use in here. */
    if (write_file(TOP "/cgroup.subtree_control", "+cpu +memory +pids") < 0)
        return fail_errno(e, errno, "cannot use the cgroup controllers cpu, memory and pids");
    if (mkdir(GROUP, 0755) < 0 && errno != EEXIST)
        return fail_errno(e, errno, "cannot make the workload's cgroup");
    int fd = open(GROUP, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return fd < 0 ? fail_errno(e, errno, "cannot open the workload's cgroup") : fd;
}

static int set(const char *file, const char *text, struct error *e) {
    char path[128];
    snprintf(path, sizeof(path), GROUP "/%s", file);
    return write_file(path, text) < 0 ? fail_errno(e, errno, "cannot set %s of the workload to '%s'", file, text) : 0;
}

/* UINT64_MAX takes a limit away. */
static void print_limit(char text[32], uint64_t value) {
    if (value == UINT64_MAX)
        strcpy(text, "max");
    else
        snprintf(text, 32, "%" PRIu64, value);
}

int cgroup_limit(const struct limits *limits, struct error *e) {
    char text[64], value[32];
    if (limits->memory) {
        print_limit(text, limits->memory);
        if (set("memory.max", text, e) < 0)
            return -1;
    }
    if (limits->cpu_quota) {
        print_limit(value, limits->cpu_quota);
        snprintf(text, sizeof(text), "%s %" PRIu64, value, limits->cpu_period ? limits->cpu_period : 100000);
        if (set("cpu.max", text, e) < 0)
            return -1;
    }
    if (limits->pids) {
        print_limit(text, limits->pids);
        if (set("pids.max", text, e) < 0)
            return -1;
    }
    if (limits->cpu_shares >= 2) { /* from cgroup v1's 2..262144 to v2's 1..10000, as runc does */
        uint64_t shares = limits->cpu_shares < 262144 ? limits->cpu_shares : 262144;
        snprintf(text, sizeof(text), "%" PRIu64, 1 + (shares - 2) * 9999 / 262142);
        if (set("cpu.weight", text, e) < 0)
            return -1;
    }
    return 0;
}

/* The kernel tells of a change of cgroup.events by POLLPRI; processes that sleep uninterruptibly freeze when they wake. */
static bool await_frozen(int events) {
    struct pollfd poll_events = {.fd = events, .events = POLLPRI};
    uint64_t end = now_ns(CLOCK_MONOTONIC) + 1000000000u;
    for (;;) {
        char text[128];
        ssize_t n = pread(events, text, sizeof(text) - 1, 0);
        text[n > 0 ? n : 0] = 0;
        uint64_t now = now_ns(CLOCK_MONOTONIC);
        if (strstr(text, "frozen 1"))
            return true;
        if (now >= end || poll(&poll_events, 1, (int)((end - now) / 1000000u) + 1) < 0)
            return false;
    }
}

int cgroup_freeze(struct error *e) {
    int events = open(GROUP "/cgroup.events", O_RDONLY | O_CLOEXEC);
    if (events < 0 || write_file(GROUP "/cgroup.freeze", "1") < 0) {
        fail_errno(e, errno, "cannot freeze the workload");
        if (events >= 0)
            close(events);
        return -1;
    }
    bool frozen = await_frozen(events);
    close(events);
    if (frozen)
        return 0;
    cgroup_thaw(e);
    return fail(e, "Unavailable", "the workload does not stand still: a process of it waits for a device");
}

int cgroup_thaw(struct error *e) {
    return write_file(GROUP "/cgroup.freeze", "0") < 0 ? fail_errno(e, errno, "cannot thaw the workload") : 0;
}

void cgroup_kill(void) {
    if (write_file(GROUP "/cgroup.kill", "1") < 0)
        debug("cgroup.kill: %s", errno_text(errno));
}

/* The number of a file, or of the line of it that begins with `key`; 0 when it is not there. */
static uint64_t number_of(const char *file, const char *key) {
    char path[128], text[8192];
    snprintf(path, sizeof(path), GROUP "/%s", file);
    if (read_file(path, text, sizeof(text)) <= 0)
        return 0;
    if (!key)
        return strtoull(text, NULL, 10);
    size_t length = strlen(key);
    for (char *line = text; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL)
        if (strncmp(line, key, length) == 0 && line[length] == ' ')
            return strtoull(line + length, NULL, 10);
    return 0;
}

uint64_t cgroup_oom_kills(void) {
    return number_of("memory.events", "oom_kill");
}

bool cgroup_stats(struct buffer *body) {
    return put_number(body, 1, number_of("cpu.stat", "usage_usec") * 1000) &&
           put_number(body, 2, number_of("cpu.stat", "user_usec") * 1000) &&
           put_number(body, 3, number_of("cpu.stat", "system_usec") * 1000) && put_number(body, 4, number_of("memory.current", NULL)) &&
           put_number(body, 5, number_of("memory.stat", "inactive_file")) && put_number(body, 6, number_of("pids.current", NULL)) &&
           put_number(body, 7, cgroup_oom_kills());
}
