/* SETUP: the root file system of the workload, and a process in namespaces of its own that waits in it for RUN. */
#ifndef AGENT_SETUP_H
#define AGENT_SETUP_H

#include "fields.h"

struct strings {
    char **at;
    size_t count;
};

struct mount {
    char *destination;
    char *type;
    char *source;
    struct strings options;
};

struct file {
    char *path;
    mode_t mode;
    const uint8_t *content;
    size_t length;
};

struct sysctl {
    char *key;
    char *value;
};

struct limits {
    uint64_t memory, cpu_quota, cpu_period, pids, cpu_shares; /* 0: none */
};

struct setup {
    char *hostname;
    char *domainname;
    uint64_t layers;
    uint64_t disk;
    char *root_tag;
    uint64_t read_only;
    uint64_t init;
    struct mount *mounts;
    size_t mount_count;
    struct file *files;
    size_t file_count;
    struct sysctl *sysctls;
    size_t sysctl_count;
    struct strings masked;
    struct strings read_only_paths;
    struct limits limits;
    struct strings copies; /* destinations of mounts */
};

/* Values point into `body` or are allocated, and live as long as the guest. */
int setup_parse(struct setup *setup, uint8_t *body, size_t length, struct error *e);
/* The fields of a MOUNT; `mount` is zeroed before. */
bool mount_parse(struct mount *mount, uint8_t *body, size_t length);
bool mount_is_bind(const struct mount *mount);
bool mount_is_disk(const struct mount *mount);
bool strings_add(struct strings *list, char *text);

/* In the agent's own mount namespace: the root at ROOT, the writable disk at DISK, the binds' share at BINDS. */
#define ROOT "/run/root"
#define DISK "/run/disk"
#define BINDS "/run/binds"
#define LAYERS "/run/l"
/* The kernel's name (`vda`) of the virtio disk with this serial number. */
int root_find_disk(const char *serial, char *name, size_t size, struct error *e);
int root_assemble(const struct setup *setup, struct error *e);
/* Mount the binds' share, unless it is. */
int root_mount_binds(struct error *e);

/* In the waiting process: everything below the new root, then the pivot. Hands back what RUN needs in the root. */
int root_enter(const struct setup *setup, struct error *e);
int root_make_read_only(struct error *e);

#endif
