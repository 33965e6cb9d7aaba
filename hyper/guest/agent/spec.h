/* PROCESS: what a program is to be run as. */
#ifndef AGENT_SPEC_H
#define AGENT_SPEC_H

#include "setup.h"

#include <sys/resource.h>

enum { MAX_RLIMITS = 32, MAX_GROUPS = 1024 };

struct rlimit_entry {
    uint64_t resource, soft, hard;
};

enum capability_set { CAP_SET_BOUNDING, CAP_SET_EFFECTIVE, CAP_SET_PERMITTED, CAP_SET_INHERITABLE, CAP_SET_AMBIENT, CAP_SETS };

struct spec {
    struct strings args;
    struct strings env;
    char *cwd;
    char *user;
    uint64_t uid, gid;
    uint32_t groups[MAX_GROUPS];
    size_t group_count;
    struct strings group_names;
    uint64_t umask;
    uint64_t terminal, rows, columns;
    uint64_t stdin_open;
    uint64_t capabilities[CAP_SETS];
    uint64_t no_new_privs;
    const uint8_t *seccomp;
    size_t seccomp_length;
    struct rlimit_entry rlimits[MAX_RLIMITS];
    size_t rlimit_count;
    bool has_oom_score_adj;
    int64_t oom_score_adj;
};

/* Values point into `body` or are allocated; the caller is a process that ends or executes soon, and frees nothing. */
int spec_parse(struct spec *spec, uint8_t *body, size_t length, struct error *e);
/* The value of the last `NAME=` in the environment; NULL when there is none. */
const char *spec_getenv(const struct spec *spec, const char *name);

#endif
